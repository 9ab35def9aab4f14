// Official TypeScript client, version 2, the whole way in: 401, metadata, registration, login
// without a browser, a call, and a step up to a scope that the first login did not ask for.
//   node auth.mjs MODE URL USER    MODE: legacy or a revision to pin
import { Client, StreamableHTTPClientTransport, UnauthorizedError } from "@modelcontextprotocol/client";

const [mode, target, user] = process.argv.slice(2);
const asked = []; // scopes of each authorization request
const store = {};
let answer; // what the browser came back with

const provider = {
  redirectUrl: "http://127.0.0.1:4711/callback",
  clientMetadata: {
    client_name: "ts-v2", redirect_uris: ["http://127.0.0.1:4711/callback"], grant_types: ["authorization_code", "refresh_token"],
    response_types: ["code"], token_endpoint_auth_method: "none",
  },
  clientInformation: () => store.client,
  saveClientInformation: (c) => { store.client = c; },
  tokens: () => store.tokens,
  saveTokens: (t) => { store.tokens = t; },
  saveCodeVerifier: (v) => { store.verifier = v; },
  codeVerifier: () => store.verifier,
  saveDiscoveryState: (s) => { store.discovery = s; },
  discoveryState: () => store.discovery,
  async redirectToAuthorization(url) {
    asked.push(url.searchParams.get("scope"));
    const response = await fetch(url, { method: "POST", redirect: "manual", body: new URLSearchParams({ user }) });
    answer = new URL(response.headers.get("location")).searchParams;
  },
};

let transport;
const connect = async () => {
  transport = new StreamableHTTPClientTransport(new URL(target), { authProvider: provider });
  const client = new Client({ name: "ts-v2", version: "1.0.0" }, { versionNegotiation: { mode: mode === "legacy" ? mode : { pin: mode } } });
  await client.connect(transport);
  return client;
};

// login finishes what an UnauthorizedError began.
const login = async (error) => {
  if (!(error instanceof UnauthorizedError)) throw error;
  await transport.finishAuth(answer);
};

let client;
try {
  client = await connect();
} catch (error) {
  await login(error);
  client = await connect();
}
const read = await client.callTool({ name: "search_orders", arguments: { limit: 1 } });

const change = () => client.callTool({ name: "update_order_status", arguments: { id: 10001, status: "paid" } });
let changed;
try {
  changed = await change();
} catch (error) {
  await login(error);
  changed = await change();
}
console.log(JSON.stringify({
  revision: client.getNegotiatedProtocolVersion(), asked, scope: store.tokens.scope,
  read: read.isError !== true && read.structuredContent.row_count === 1, changed: changed.content[0].text,
}));
await client.close();
