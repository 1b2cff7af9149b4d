"""A server with OpenAI's interface for one offloaded model. It needs FastAPI, uvicorn and prometheus_client."""
