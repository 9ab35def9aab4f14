// An identity provider that nobody here wrote: oidc-provider with PKCE, resource indicators, dynamic
// registration, DPoP and introspection, and its own pages for people who develop.
//   node provider.mjs
// It writes its address, reads orders a line at a time, answers each with a line, and ends with
// its input:
//   {"resource": URL, "format": "jwt"|"opaque", "seconds": 300}   issue tokens for it
//   {"rotate": true}   sign with a new key; the one before stays published
//   {"retire": true}   publish the key that signs and no other
import { createServer } from "node:http";
import { generateKeyPairSync, randomUUID } from "node:crypto";
import { createInterface } from "node:readline";
import { Provider, errors } from "oidc-provider";

console.info = console.warn; // its remarks are no answers
const scope = "a:read a:admin";
const resources = new Map();

const newKey = (alg, type, options) =>
  ({ ...generateKeyPairSync(type, options).privateKey.export({ format: "jwk" }), kid: randomUUID(), use: "sig", alg });
const signing = () => newKey("ES256", "ec", { namedCurve: "P-256" });
const idTokens = newKey("RS256", "rsa", { modulusLength: 2048 }); // RS256 by default
let keys = [signing()];

const configuration = () => ({
  jwks: { keys: [...keys, idTokens] },
  cookies: { keys: ["not a secret"] },
  scopes: ["openid", "offline_access", ...scope.split(" ")],
  pkce: { required: () => true },
  // The answer about an opaque token of a machine would name nobody.
  extraTokenClaims: (_ctx, token) => (token.kind === "ClientCredentials" ? { sub: token.clientId } : undefined),
  clients: [{ // the resource server asks about tokens, and machines get some
    client_id: "newel", client_secret: "hush hush hush hush hush hush hush", redirect_uris: [], response_types: [],
    grant_types: ["client_credentials"], token_endpoint_auth_method: "client_secret_basic",
  }],
  features: {
    clientCredentials: { enabled: true },
    dPoP: { enabled: true },
    introspection: { enabled: true },
    registration: { enabled: true },
    resourceIndicators: {
      enabled: true,
      useGrantedResource: () => true,
      getResourceServerInfo(_ctx, resource) {
        const r = resources.get(resource);
        if (!r) throw new errors.InvalidTarget();
        return { scope, audience: resource, accessTokenTTL: r.seconds, accessTokenFormat: r.format, jwt: { sign: { alg: "ES256" } } };
      },
    },
  },
});

let answer = (_request, response) => response.writeHead(503).end();
const server = createServer((request, response) => answer(request, response));
await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
const issuer = `http://127.0.0.1:${server.address().port}`;

// A provider has its keys for life, so that other keys make another one. What it knows of clients
// and logins is in its adapter, which all share.
const use = (next) => {
  keys = next;
  const provider = new Provider(issuer, configuration());
  provider.on("server_error", (_ctx, error) => console.error(error));
  answer = provider.callback();
};
use(keys);
console.log(issuer);

for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  if (order.resource) resources.set(order.resource, order);
  if (order.rotate) use([signing(), ...keys]);
  if (order.retire) use(keys.slice(0, 1));
  console.log("done");
}
server.close();
server.closeAllConnections();
