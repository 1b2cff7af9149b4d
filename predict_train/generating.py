"""The commands that generate text: `generate` and `chat`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .predictors.errors import UserError
from .predictors.generation import check_generation
from .predictors.loading import load_tokenizer, resolve_device
from .predictors.provenance import command, versions
from .running import dtype_of, tell_slots
from .runtime.conversation import ChatError, Conversation
from .runtime.generate import Generation, arguments_of
from .runtime.generate import generate as generate_text
from .runtime.load import load_offloaded
from .runtime.settings import ChatConfig, GenerateConfig, Generating, LoadConfig

NO_TEMPLATE = "the model has no chat template, so it goes on with the text as it is"
COMMANDS = "/reset forgets what was said, /stats tells what the last answer cost, /exit ends"


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Streams a text for each prompt, and says what its tokens cost. Returns everything for a JSON file."""
    if config.prompts.count("-") > 1:
        raise UserError("standard input can be read only once; give --prompt - only once")
    prompts = [_from_stdin() if prompt == "-" else prompt for prompt in config.prompts]
    model, tokenizer = loaded(config)
    if config.chat and not tokenizer.chat_template:
        typer.echo(NO_TEMPLATE, err=True)
    texts: list[dict[str, Any]] = []
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"{chr(10) if texts else ''}prompt {len(texts) + 1} of {len(prompts)}: {prompt}")
        if config.chat:
            result = Conversation(model, tokenizer, config).answer(prompt, _tell, config.seed)
        else:
            result = generate_text(model, tokenizer, prompt, config, config.seed, _tell)
        print()
        _tell_figures(result)
        texts.append({"prompt": prompt, **asdict(result)})
    settings = config.model_dump(mode="json", exclude={"json_file", "prompt"})
    return {"texts": texts, "settings": settings, "versions": versions(), "command": command()}


def chat(config: ChatConfig) -> None:
    """Answers each line of standard input, until it ends. A line that begins with / is a command: `COMMANDS`."""
    model, tokenizer = loaded(config)
    conversation = Conversation(model, tokenizer, config, config.system)
    is_terminal = sys.stdin.isatty()
    last: Generation | None = None
    if not conversation.has_template:
        typer.echo(NO_TEMPLATE, err=True)
    if is_terminal:
        typer.echo(COMMANDS, err=True)
    while (line := _line(is_terminal)) is not None:
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                conversation.reset()
                last = None
                typer.echo("what was said is forgotten", err=True)
            case "/stats":
                if last is None:
                    typer.echo("nothing has been answered yet", err=True)
                else:
                    _tell_figures(last)
            case other if other.startswith("/") and " " not in other:
                typer.echo(f"there is no command {other}: {COMMANDS}", err=True)
            case _:
                seed = config.seed + len(conversation.messages)  # asked again, the model may answer otherwise
                try:
                    last = conversation.answer(line if conversation.has_template else line + "\n", _tell, seed)
                    print()
                except KeyboardInterrupt:
                    if not is_terminal:
                        raise
                    print()
                except ChatError as error:
                    if not is_terminal:
                        raise
                    typer.echo(str(error), err=True)


def loaded(config: Generating) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a command, offloaded, and its tokenizer. Refuses what it can't generate as before it is loaded."""
    tokenizer = load_tokenizer(config.model)
    check_generation(config.model, tokenizer, partial(arguments_of, sampling=config))
    settings = config.values_of(LoadConfig) | {"dtype": dtype_of(config, resolve_device(config.device))}
    model = load_offloaded(config.model, config.predictors, **settings)
    tell_slots(model, config)
    return model, tokenizer


def _tell(text: str) -> None:
    print(text, end="", flush=True)


def _tell_figures(result: Generation) -> None:
    for name, value in result.figures().items():
        typer.echo(f"{name:>22}: {value}", err=True)


def _line(is_terminal: bool) -> str | None:
    try:
        return input("> " if is_terminal else "")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise _not_text(error) from error


def _from_stdin() -> str:
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise _not_text(error) from error
    if not text:
        raise UserError("standard input is empty; give it some text to go on from")
    return text


def _not_text(error: UnicodeDecodeError) -> UserError:
    return UserError(f"standard input is not {error.encoding.upper()}; convert it, for example with iconv")
