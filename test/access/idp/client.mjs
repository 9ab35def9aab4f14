// Official TypeScript client, version 2, at a server whose tokens come from another provider: 401,
// metadata, registration, login and consent without a browser, a call; the same call when the token
// has expired; and one that needs more scopes.
//   node client.mjs MODE URL [dpop]    MODE: legacy or a revision to pin
import { setTimeout as pause } from "node:timers/promises";
import { Client, DpopSession, StreamableHTTPClientTransport, UnauthorizedError } from "@modelcontextprotocol/client";

const [mode, target, bound] = process.argv.slice(2);
const redirectUrl = "http://127.0.0.1:4711/callback"; // nobody listens there: the browser stops before
const asked = []; // scopes of each authorization request
const pages = []; // that the person saw
const store = {};
let answer; // what the browser came back with

// browse is a person with a browser: it follows redirects, fills in forms, and returns where the
// provider sends it in the end.
const cookies = new Map();
const browse = async (url) => {
  let request = { method: "GET" };
  for (let hops = 0; hops < 20; hops++) {
    const response = await fetch(url, { ...request, redirect: "manual", headers: { cookie: [...cookies].map(([k, v]) => `${k}=${v}`).join("; ") } });
    for (const c of response.headers.getSetCookie()) {
      const [, name, value] = /^([^=]+)=([^;]*)/.exec(c);
      if (value) cookies.set(name, value); else cookies.delete(name);
    }
    const text = await response.text();
    if (response.headers.has("location")) {
      url = new URL(response.headers.get("location"), url);
      request = { method: "GET" };
      if (url.href.startsWith(redirectUrl)) return url.searchParams;
      continue;
    }
    const action = /<form[^>]* action="([^"]+)"/.exec(text)?.[1];
    const token = /name="token" value="([^"]+)"/.exec(text)?.[1]; // of Newel's own page
    const prompt = token ? "allow" : /name="prompt" value="([^"]+)"/.exec(text)?.[1];
    if (!action || !prompt) throw new Error(`a page without a form, status ${response.status}: ${text}`);
    pages.push(prompt);
    url = new URL(action, url);
    request = { method: "POST", body: new URLSearchParams(token ? { token, answer: prompt } : { prompt, login: "ada", password: "any" }) };
  }
  throw new Error("the provider sends the browser in circles");
};

const session = bound ? await DpopSession.create() : undefined;
const provider = {
  redirectUrl,
  clientMetadata: {
    client_name: "ts-v2", redirect_uris: [redirectUrl], grant_types: ["authorization_code", "refresh_token"],
    response_types: ["code"], token_endpoint_auth_method: "none",
  },
  clientInformation: () => store.client,
  saveClientInformation: (c) => { store.client = c; store.registered = (store.registered ?? 0) + 1; },
  tokens: () => store.tokens,
  saveTokens: (t) => { store.tokens = t; },
  saveCodeVerifier: (v) => { store.verifier = v; },
  codeVerifier: () => store.verifier,
  saveDiscoveryState: (s) => { store.discovery = s; },
  discoveryState: () => store.discovery,
  dpop: () => session,
  async redirectToAuthorization(url) {
    asked.push(url.searchParams.get("scope"));
    answer = await browse(url);
  },
};

let transport, client;
const connect = async () => {
  transport = new StreamableHTTPClientTransport(new URL(target), { authProvider: provider });
  client = new Client({ name: "ts-v2", version: "1.0.0" }, { versionNegotiation: { mode: mode === "legacy" ? mode : { pin: mode } } });
  await client.connect(transport);
};
// loggedIn does something, logging in first when that is what it takes.
const loggedIn = async (something) => {
  try {
    return await something();
  } catch (error) {
    if (!(error instanceof UnauthorizedError)) throw error;
    await transport.finishAuth(answer);
    return something();
  }
};
const textOf = (result) => (result.isError ? "failed: " : "") + result.content[0].text;
const claims = () => JSON.parse(Buffer.from(store.tokens.access_token.split(".")[1], "base64url"));

await loggedIn(connect);
const said = { revision: client.getNegotiatedProtocolVersion(), type: store.tokens.token_type, subject: claims().sub, audience: claims().aud };
said.read = textOf(await client.callTool({ name: "read_note", arguments: { id: 1 } }));

const old = store.tokens.access_token;
const logins = asked.length;
await pause(Math.max(0, claims().exp * 1000 + 1500 - Date.now())); // the server allows for a second
said.later = textOf(await client.callTool({ name: "read_note", arguments: { id: 1 } }));
said.refreshed = store.tokens.access_token !== old && asked.length === logins;

// The client registered with the scopes it was asked for first, and this provider takes them for the
// most it may ever have. So it registers anew, as people must do here.
delete store.client;
said.changed = textOf(await loggedIn(() => client.callTool({ name: "change_note", arguments: { id: 1, text: mode } })));
console.log(JSON.stringify({ ...said, asked, pages, registered: store.registered, scope: claims().scope }));
await client.close();
