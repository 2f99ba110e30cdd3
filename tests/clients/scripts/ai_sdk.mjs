// Vercel's AI SDK, the package `ai`, with its providers for OpenAI's API (responses and chat) and for servers like it.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const { MODEL, OPENAI_BASE_URL: baseURL } = process.env;
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "pensieve", baseURL, includeUsage: true, supportsStructuredOutputs: true });
const models = { compatible: compatible(MODEL), chat: openai.chat(MODEL), responses: openai(MODEL) };

const city = z.object({ city: z.enum(["Rome", "Paris"]) });
const asked = [];
const get_weather = tool({
  description: "The weather of a city.",
  inputSchema: city,
  execute: ({ city }) => {
    asked.push(city);
    return `It is sunny in ${city}.`;
  },
});
// The first step has to call the tool, the second one may not.
const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "get_weather" } : "none" });
const settings = { temperature: 0, maxRetries: 0, maxOutputTokens: 200 };

function checkLoop(steps) {
  assert.equal(steps.length, 2, "the loop has two steps");
  assert.ok(asked.length > 0, "the tool was not called");
  assert.ok(asked.every((name) => ["Rome", "Paris"].includes(name)), asked.join());
  assert.ok(steps[1].text, "the loop ends with an answer");
  const known = steps[0].usage.inputTokens + steps[0].usage.outputTokens - 2;
  assert.ok(steps[1].usage.cachedInputTokens >= known, JSON.stringify(steps.map((step) => step.usage)));
  asked.length = 0;
}

for (const [name, model] of Object.entries(models)) {
  const loop = { model, tools: { get_weather }, stopWhen: stepCountIs(3), prepareStep, ...settings };
  loop.providerOptions = { openai: { parallelToolCalls: false }, pensieve: { parallel_tool_calls: false } };
  const messages = [{ role: "user", content: "How is the weather in Rome?" }];
  const first = await generateText({ ...loop, messages });
  checkLoop(first.steps);
  // Another turn, whose history has what the first one gave.
  messages.push(...first.response.messages, { role: "user", content: "And in Paris?" });
  const second = streamText({ ...loop, messages, onError: ({ error }) => { throw error; } });
  let text = "";
  for await (const piece of second.textStream) text += piece;
  assert.ok(text);
  checkLoop(await second.steps);

  const asking = { model, prompt: "Where?", ...settings };
  city.parse((await generateObject({ ...asking, schema: city })).object);
  const streamed = streamObject({ ...asking, schema: city, onError: ({ error }) => { throw error; } });
  for await (const partial of streamed.partialObjectStream) assert.equal(typeof partial, "object");
  city.parse(await streamed.object);
  city.parse((await generateText({ ...asking, output: Output.object({ schema: city }) })).output);
  console.log("ai", name, "passes");
}
