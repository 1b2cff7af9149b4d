"""A server with OpenAI's interface for one offloaded model. It needs Starlette, uvicorn and prometheus_client."""
