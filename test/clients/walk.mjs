// The walk every TypeScript client takes through the fixture. It prints one JSON object, which
// clients_test.go compares. What differs between the SDKs' major versions is given by the caller.

/** Answers a form: every asked field that is known here. */
export function fill(params) {
  const known = { name: "Ada", color: "blue" };
  const content = {};
  for (const field of Object.keys(params.requestedSchema.properties)) content[field] = known[field];
  return { action: "accept", content };
}

/** callTool(params, options) hides that the two SDKs order the arguments differently. */
export async function walk(client, revision, callTool) {
  const { tools } = await client.listTools();
  const { resources } = await client.listResources();
  const { prompts } = await client.listPrompts();
  const called = await callTool({ name: "test_simple_text", arguments: {} });
  const failed = await callTool({ name: "test_error_handling", arguments: {} });
  const read = await client.readResource({ uri: "test://template/42/data" });
  const prompt = await client.getPrompt({ name: "test_prompt_with_arguments", arguments: { arg1: "a", arg2: "b" } });
  const asked = await callTool({ name: "test_input_required_result_multi_round", arguments: {} });
  const steps = [];
  const long = await callTool({ name: "test_tool_with_progress", arguments: {} }, { onprogress: (p) => steps.push(p.progress) });
  await client.close();
  console.log(JSON.stringify({
    revision,
    listed: tools.some((t) => t.name === "test_simple_text" && t.inputSchema.type === "object")
      && resources.some((r) => r.uri === "test://static-text")
      && prompts.some((p) => p.name === "test_simple_prompt"),
    called: called.content[0].text,
    failed: Boolean(failed.isError) && failed.content[0].text,
    read: read.contents[0].text,
    prompt: prompt.messages[0].content.text,
    asked: asked.content[0].text,
    progress: steps,
    long: long.content[0].text,
  }));
}
