// The `openai` package of npm: chat, streams, calls that it runs itself, parsed answers, responses, errors.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = process.env.MODEL;
const client = new OpenAI({ maxRetries: 0 });
const options = { model, temperature: 0, max_tokens: 200 };
const ask = [{ role: "user", content: "How is the weather in Rome?" }];

const whole = await client.chat.completions.create({ messages: ask, ...options, max_tokens: 16 });
const stream = client.chat.completions.stream({ messages: ask, ...options, max_tokens: 16 });
let told = "";
stream.on("content", (delta) => (told += delta));
assert.equal(await stream.finalContent(), whole.choices[0].message.content);
assert.equal(told, whole.choices[0].message.content);

// The package runs the tool, and sends its result back. It asks for no second call when one was forced.
const City = z.object({ city: z.enum(["Rome", "Paris"]) });
const asked = [];
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Rome", "Paris"] } },
  required: ["city"],
  additionalProperties: false,
};
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather of a city.",
    parse: (text) => City.parse(JSON.parse(text)),
    function: ({ city }) => {
      asked.push(city);
      return `It is sunny in ${city}.`;
    },
    parameters,
  },
};
const choice = { type: "function", function: { name: "get_weather" } };
for (const streamed of [false, true]) {
  const runner = client.chat.completions.runTools({
    messages: ask, tools: [weather], tool_choice: choice, parallel_tool_calls: false, stream: streamed, ...options,
  }, { maxChatCompletions: 2 });
  await runner.done();
  assert.ok(asked.length > 0, "the tool was not called");
  assert.ok(runner.messages.some((message) => message.role === "tool"), "no result was sent back");
  asked.length = 0;
}

// A loop by hand: the second step finds the first one in the cache.
const { function: { name, description } } = weather;
const tools = [{ type: "function", function: { name, description, parameters } }];
const more = { tools, parallel_tool_calls: false, ...options };
const first = await client.chat.completions.create({ messages: ask, tool_choice: "required", ...more });
assert.equal(first.choices[0].finish_reason, "tool_calls");
const [call] = first.choices[0].message.tool_calls;
const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
const second = await client.chat.completions.create({
  messages: [...ask, first.choices[0].message, result], tool_choice: "none", ...more,
});
assert.ok(second.choices[0].message.content);
const known = first.usage.prompt_tokens + first.usage.completion_tokens - 2;
assert.ok(second.usage.prompt_tokens_details.cached_tokens >= known, JSON.stringify([first.usage, second.usage]));

const place = await client.chat.completions.parse({
  messages: ask, response_format: zodResponseFormat(City, "place"), ...options,
});
assert.ok(["Rome", "Paris"].includes(place.choices[0].message.parsed.city));

const parsed = await client.responses.parse({
  model, input: "Where?", max_output_tokens: 200, temperature: 0, text: { format: zodTextFormat(City, "place") },
});
assert.ok(["Rome", "Paris"].includes(parsed.output_parsed.city));
const called = await client.responses.create({
  model, input: "How is the weather in Rome?", max_output_tokens: 200, temperature: 0, tool_choice: "required",
  tools: [{ type: "function", name: "get_weather", strict: true, parameters }],
});
const { arguments: text } = called.output.find((item) => item.type === "function_call");
City.parse(JSON.parse(text));

await assert.rejects(client.chat.completions.create({ messages: ask, model: "another" }), OpenAI.NotFoundError);
console.log("openai (npm)", JSON.parse(readFileSync(new URL("node_modules/openai/package.json", import.meta.url))).version);
