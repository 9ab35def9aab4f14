// Official TypeScript client, version 2: the stateless revision, and the session revisions.
//   node v2.mjs MODE http URL | node v2.mjs MODE stdio COMMAND...    MODE: legacy, auto or a revision to pin
import { Client, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";
import { fill, walk } from "./walk.mjs";

const [mode, kind, target, ...args] = process.argv.slice(2);
const client = new Client({ name: "ts-v2", version: "1.0.0" }, {
  capabilities: { elicitation: { form: {} } },
  versionNegotiation: { mode: mode === "legacy" || mode === "auto" ? mode : { pin: mode } },
});
client.setRequestHandler("elicitation/create", async (request) => fill(request.params));
await client.connect(kind === "http" ? new StreamableHTTPClientTransport(new URL(target)) : new StdioClientTransport({ command: target, args }));
await walk(client, client.getNegotiatedProtocolVersion(), (params, options) => client.callTool(params, options));
