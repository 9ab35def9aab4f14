// The TypeScript SDK as its documentation shows it for stateless servers: a typed tool, JSON answers,
// a server for each request, nothing around it.
import { createServer } from "node:http";
import { toNodeHandler } from "@modelcontextprotocol/node";
import { createMcpHandler, McpServer } from "@modelcontextprotocol/server";
import { z } from "zod";

const inputSchema = z.object({ text: z.string().describe("what to say") });

const handler = createMcpHandler(
  () => {
    const server = new McpServer({ name: "bench", version: "1.0.0" });
    server.registerTool("echo", { description: "Says what it was told.", inputSchema }, async ({ text }) => ({
      content: [{ type: "text", text }],
    }));
    return server;
  },
  { responseMode: "json" },
);

const [host, port] = process.argv[2].split(":");
createServer(toNodeHandler(handler)).listen(Number(port), host);
