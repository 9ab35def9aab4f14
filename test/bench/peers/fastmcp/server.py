"""FastMCP as its documentation shows it for stateless servers: a typed tool, JSON answers, nothing
around it. With the URL of a server as second argument it is FastMCP's proxy in front of that."""

import sys

from fastmcp import FastMCP
from fastmcp.server import create_proxy

host, port = sys.argv[1].split(":")
if len(sys.argv) > 2:
    server = create_proxy(sys.argv[2], name="bench")
else:
    server = FastMCP("bench", version="1.0.0")

    @server.tool
    def echo(text: str) -> str:
        """Says what it was told."""
        return text


server.run(
    transport="http",
    host=host,
    port=int(port),
    stateless_http=True,
    json_response=True,
    show_banner=False,
    log_level="warning",
    uvicorn_config={"access_log": False},
)
