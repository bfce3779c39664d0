// Clients of OpenAI's protocol in JavaScript: `node clients.mjs CLIENT ADDRESS CASES`, in the folder of `node_modules`.
// The file of cases and what is printed are those of `clients.py`.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

// Packages are looked for in the current folder, not beside this file.
const require = createRequire(`${process.cwd()}/`);

function openaiNode(address) {
  const { OpenAI } = require("openai");
  const client = new OpenAI({ baseURL: address, apiKey: "none", maxRetries: 0 });
  return async ({ model, messages, stream, options }) => {
    const answer = await client.chat.completions.create({ model, messages, stream, ...options });
    if (!stream) return answer.choices[0].message.content;
    let text = "";
    for await (const chunk of answer) text += chunk.choices[0]?.delta?.content ?? "";
    return text;
  };
}

function vercel(address) {
  const { generateText, streamText } = require("ai");
  const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
  const provider = createOpenAICompatible({ name: "emma", baseURL: address, apiKey: "none", includeUsage: true });
  const image = (part) => ({ type: "image", image: new URL(part.image_url.url) });
  return async ({ model, messages, stream, options }) => {
    const call = {
      model: provider.chatModel(model),
      messages: messages.map(({ role, content }) => ({
        role,
        content: Array.isArray(content) ? content.map((part) => (part.type === "text" ? part : image(part))) : content,
      })),
      maxOutputTokens: options.max_tokens,
      presencePenalty: options.presence_penalty,
      maxRetries: 0,
    };
    if (!stream) return (await generateText(call)).text;
    let text = "";
    for await (const part of streamText({ ...call, onError: () => {} }).fullStream) {
      if (part.type === "error") throw part.error;
      if (part.type === "text-delta") text += part.text;
    }
    return text;
  };
}

const [name, address, path] = process.argv.slice(2);
const ask = { "openai-node": openaiNode, vercel }[name](address);
const results = [];
for (const given of JSON.parse(readFileSync(path, "utf8"))) {
  try {
    results.push({ text: await ask(given) });
  } catch (error) {
    // A class of the package's own is minified away where it has a `name`.
    const kind = error.name === "Error" ? error.constructor.name : error.name;
    results.push({ error: kind, text: `${error.message} ${error.responseBody ?? ""}` });
  }
}
console.log(JSON.stringify(results));
