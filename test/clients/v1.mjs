// Official TypeScript client, version 1: session revisions.
//   node v1.mjs http URL | node v1.mjs stdio COMMAND...
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { ElicitRequestSchema, LATEST_PROTOCOL_VERSION } from "@modelcontextprotocol/sdk/types.js";
import { fill, walk } from "./walk.mjs";

const [kind, target, ...args] = process.argv.slice(2);
const client = new Client({ name: "ts-v1", version: "1.0.0" }, { capabilities: { elicitation: {} } });
client.setRequestHandler(ElicitRequestSchema, async (request) => fill(request.params));
const transport = kind === "http" ? new StreamableHTTPClientTransport(new URL(target)) : new StdioClientTransport({ command: target, args });
await client.connect(transport);
const revision = kind === "http" ? transport.protocolVersion : LATEST_PROTOCOL_VERSION;
await walk(client, revision, (params, options) => client.callTool(params, undefined, options));
