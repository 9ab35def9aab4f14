// Package mcpwire speaks MCP revision 2026-07-28, the stateless one, in bytes: it decodes one
// message once and strictly into a [call.Call], and encodes a result, a question or an error.
// Both doors that carry the revision (Streamable HTTP and stdio) use it.
//
// Start reading at [Codec.Decode], then [Codec.Serve]. [ErrorTable] is the one table from error
// codes to JSON-RPC codes and HTTP statuses.
//
// The package knows no transport and holds no state between messages: what has to be
// remembered between the rounds of a call travels sealed in requestState.
package mcpwire
