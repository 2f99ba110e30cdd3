// The page: a chat over /v1/responses and /v1/conversations, and beside it the cache as /v1/cache/map tells it.
// Nothing that a server or a model says becomes markup: all of it goes into text nodes.
import { markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// -- the server -------------------------------------------------------------------------------------------------------

const KEY = "pensieve.key";
let asking = null;

class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code;
  }
}

/** A request with the API key, if there is one; asks for a key where the server wants one, and tries again. */
async function request(method, path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = {};
    if (key) headers.authorization = `Bearer ${key}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    const answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
    if (answer.ok) return answer;
    const error = (await answer.json().catch(() => ({}))).error;
    if (answer.status !== 401) throw new ServerError(answer.status, error);
    if (key === sessionStorage.getItem(KEY)) await askForKey(key ? "That key is not known here." : "");
  }
}

const ask = async (method, path, body) => (await request(method, path, body)).json();

/** Resolves when a key has been given. However many requests want it, they share the dialog. */
function askForKey(reason) {
  if (!asking) {
    if (reason) $("key-reason").textContent = `${reason} Which one is to be used until this tab is closed?`;
    $("key").value = "";
    $("key-button").hidden = false;
    $("key-dialog").showModal();
    asking = new Promise((resolve) => {
      $("key-dialog").addEventListener("close", () => {
        sessionStorage.setItem(KEY, $("key").value.trim());
        asking = null;
        resolve();
      }, { once: true });
    });
  }
  return asking;
}

/** The data of server-sent events, as they come. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n").trim();
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// -- conversations: their ids and titles are kept here, what was said on the server -----------------------------------

const LIST = "pensieve.conversations";
const MAX_ITEMS = 20; // of one request
let model = "";
let current = null; // id
let messages = []; // of the current one: {ids, role, thought, text, note}; an answer may be several items
let running = null; // {controller, responseId, conversation}

const conversations = () => JSON.parse(localStorage.getItem(LIST) ?? "[]");
const titleOf = (id) => conversations().find((entry) => entry.id === id)?.title;

function keepConversations(entries) {
  localStorage.setItem(LIST, JSON.stringify(entries));
  drawConversations();
}

/** A new conversation that begins with these messages. */
async function create(title, beginning = []) {
  const items = beginning.flatMap(itemsOf);
  const { id } = await ask("POST", "/v1/conversations", { metadata: { title }, items: items.slice(0, MAX_ITEMS) });
  for (let start = MAX_ITEMS; start < items.length; start += MAX_ITEMS) {
    await ask("POST", `/v1/conversations/${id}/items`, { items: items.slice(start, start + MAX_ITEMS) });
  }
  keepConversations([{ id, title }, ...conversations()]);
  return id;
}

async function open(id) {
  if (running) await stop();
  current = id;
  messages = [];
  say("");
  drawConversations();
  if (id) {
    try {
      const found = await readItems(id);
      if (current !== id) return;
      messages = found;
    } catch (error) {
      say(error.status === 404 ? "This conversation is not there any more, or belongs to another key." : error.message);
    }
  }
  drawMessages();
  drawRows();
}

async function readItems(id) {
  const found = [];
  for (let after = ""; ;) {
    const page = await ask("GET", `/v1/conversations/${id}/items?order=asc&limit=100${after}`);
    for (const item of page.data) {
      const role = item.role ?? "assistant"; // what is no message is a part of an answer: what was thought before it
      const last = found.at(-1);
      const isMore = role === "assistant" && last?.role === role;
      const message = isMore ? last : { ids: [], role, thought: "", text: "" };
      if (!isMore) found.push(message);
      message.ids.push(item.id);
      const text = (item.content ?? []).map((part) => part.text ?? "").join("");
      if (item.type === "reasoning") message.thought += text;
      else message.text += text;
    }
    if (!page.has_more) return found;
    after = `&after=${page.last_id}`;
  }
}

/** What a message is kept as. */
function itemsOf({ role, thought, text }) {
  const items = thought ? [{ type: "reasoning", content: [{ type: "reasoning_text", text: thought }] }] : [];
  return text ? [...items, { role, content: text }] : items;
}

async function rename(id, title) {
  await ask("POST", `/v1/conversations/${id}`, { metadata: { title } });
  keepConversations(conversations().map((entry) => (entry.id === id ? { id, title } : entry)));
  drawRows();
}

async function remove(id) {
  try {
    await ask("DELETE", `/v1/conversations/${id}`);
  } catch (error) {
    if (error.status !== 404) throw error;
  }
  keepConversations(conversations().filter((entry) => entry.id !== id));
  if (current === id) await open(null);
}

const shortened = (text) => (text.length > 40 ? `${text.slice(0, 39)}…` : text).replaceAll("\n", " ");

// -- turns -------------------------------------------------------------------------------------------------------------

/** Ask, and show the answer as it comes. */
async function send(text) {
  say("");
  if (!current) {
    current = await create(shortened(text));
    drawConversations();
  }
  const conversation = current;
  const turn = (running = { controller: new AbortController(), responseId: null, conversation });
  const question = { ids: [], role: "user", text };
  const answer = { ids: [], role: "assistant", thought: "", text: "", isComing: true };
  messages.push(question, answer);
  drawMessages();
  drawButtons();
  const start = performance.now();
  let firstToken = null;
  try {
    const body = { model, input: text, conversation, stream: true, truncation: "auto", temperature: Number($("temperature").value) };
    for await (const event of events(await request("POST", "/v1/responses", body, turn.controller.signal))) {
      turn.responseId ??= event.response?.id ?? null;
      const isThought = event.type === "response.reasoning_text.delta";
      if (isThought || event.type === "response.output_text.delta") {
        firstToken ??= performance.now() - start;
        answer[isThought ? "thought" : "text"] += event.delta;
        drawLater(answer);
      } else if (event.type === "response.completed" || event.type === "response.incomplete") {
        answer.note = account(event.response.usage, firstToken);
        answer.isDone = true;
      } else if (event.type === "response.failed" || event.type === "error") {
        const error = event.response?.error ?? event.error ?? event;
        throw new ServerError(0, error);
      }
    }
    if (!answer.isDone) throw new ServerError(0, { message: "the connection ended before the answer did" });
    const last = (await ask("GET", `/v1/conversations/${conversation}/items?order=desc&limit=100`)).data;
    const asked = last.findIndex((item) => item.role === "user");
    answer.ids = last.slice(0, asked).map((item) => item.id);
    question.ids = [last[asked].id];
  } catch (error) {
    if (turn.isStopped) {
      answer.note = "stopped";
      await keepStopped(turn, question, answer);
    } else {
      messages = messages.filter((message) => message !== question && message !== answer);
      if (conversation === current && !$("input").value) $("input").value = text;
      say(error.message);
    }
  }
  answer.isComing = false;
  running = null;
  turn.ended?.();
  drawButtons();
  if (conversation === current) drawMessages();
}

/** A turn that was stopped adds nothing to its conversation by itself: what was shown is added as it is. */
async function keepStopped(turn, question, answer) {
  try {
    if (turn.responseId) await ask("POST", `/v1/responses/${turn.responseId}/cancel`);
    const items = [question, answer].flatMap(itemsOf);
    const { data } = await ask("POST", `/v1/conversations/${turn.conversation}/items`, { items });
    const ids = data.map((item) => item.id);
    [question.ids, answer.ids] = [ids.slice(0, 1), ids.slice(1)];
  } catch (error) {
    say(error.message);
  }
}

/** Resolves when the turn has ended. */
function stop() {
  const turn = running;
  if (!turn) return Promise.resolve();
  turn.isStopped = true;
  const ended = new Promise((resolve) => (turn.ended = resolve));
  turn.controller.abort();
  return ended;
}

const SOURCES = { cpu: "from the CPU tier", disk: "from disk", peer: "from another replica" };

function account(usage, firstToken) {
  const { cached_tokens: cached, cached_tokens_by_tier: byTier = {} } = usage.input_tokens_details;
  const loaded = Object.entries(byTier).filter(([tier]) => tier !== "gpu").map(([tier, tokens]) => `${tokens} ${SOURCES[tier] ?? tier}`);
  const from = loaded.length ? ` (${loaded.join(", ")})` : "";
  const seconds = firstToken === null ? "" : ` · first token after ${(firstToken / 1000).toFixed(2)} s`;
  return `${cached} tokens cached${from} · ${usage.input_tokens - cached} computed · ${usage.output_tokens} generated${seconds}`;
}

/** The last question again: it and its answer are taken out first. */
async function regenerate() {
  const [question, answer] = messages.slice(-2);
  for (const id of [...answer.ids, ...question.ids]) await ask("DELETE", `/v1/conversations/${current}/items/${id}`);
  messages = messages.slice(0, -2);
  await send(question.text);
}

/** A conversation of its own that begins as this one does; the cache shares what both have in common. */
async function fork(numMessages, suffix) {
  const title = `${titleOf(current) ?? "Conversation"} (${suffix})`;
  await open(await create(title, messages.slice(0, numMessages)));
}

// -- drawing the chat --------------------------------------------------------------------------------------------------

const say = (text) => ($("alert").textContent = text);

/** Whatever fails is said. */
const act = (work) => async (...given) => {
  try {
    await work(...given);
  } catch (error) {
    say(error.message);
  }
};

const button = (text, label, work, more = {}) =>
  element("button", { type: "button", textContent: text, ariaLabel: label, title: label, onclick: act(work), ...more });

function drawConversations() {
  $("conversations").replaceChildren(...conversations().map(({ id, title }) => {
    const item = element("li", { className: id === current ? "current" : "" });
    const change = () => {
      const field = element("input", { value: title, ariaLabel: "Title", maxLength: 200 });
      let isOver = false;
      const end = act(async (isKept) => {
        if (isOver) return;
        isOver = true;
        if (isKept && field.value.trim()) await rename(id, field.value.trim());
        else drawConversations();
      });
      field.onkeydown = (event) => {
        if (event.key === "Enter") end(true);
        if (event.key === "Escape") end(false);
      };
      field.onblur = () => end(true);
      item.replaceChildren(field);
      field.focus();
      field.select();
    };
    const gone = button("✕", `Delete ${title}`, async () => {
      if (gone.classList.contains("sure")) return remove(id);
      gone.classList.add("sure");
      gone.textContent = "sure?";
    }, { className: "tool delete", onblur: () => { gone.classList.remove("sure"); gone.textContent = "✕"; } });
    item.append(
      button(title, title, () => open(id), { className: "open", ariaCurrent: id === current ? "true" : null }),
      button("✎", `Rename ${title}`, change, { className: "tool rename" }),
      gone,
    );
    return item;
  }));
}

function drawButtons() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
}

function drawMessages() {
  $("messages").replaceChildren(...messages.map(drawMessage));
  $("messages").scrollTop = $("messages").scrollHeight;
}

function drawMessage(message, index) {
  const text = element("div", { className: "text" });
  const tools = element("div", { className: "tools" });
  const item = element("li", { className: message.role }, text, tools);
  message.node = text;
  drawText(message);
  if (message.isComing || running) return item;
  tools.append(message.note ?? "");
  if (message.role === "user") {
    tools.append(button("Edit", "Edit: ask something else here, in a conversation of its own", () => edit(item, index), { className: "edit" }));
  } else {
    const isLast = index === messages.length - 1;
    if (isLast && message.ids.length && messages[index - 1]?.ids.length && messages[index - 1].role === "user") {
      tools.append(button("Regenerate", "Ask again", regenerate, { className: "regenerate" }));
    }
    tools.append(button("Fork", "Go on from here in a conversation of its own", () => fork(index + 1, "fork"), { className: "fork" }));
  }
  return item;
}

function drawText(message) {
  if (message.role === "user") {
    message.node.textContent = message.text;
    return;
  }
  const said = message.text
    ? markdown(message.text)
    : element("span", { className: "waiting", textContent: message.isComing ? "…" : "(nothing)" });
  message.node.replaceChildren(...(message.thought ? [drawThought(message)] : []), said);
}

/** What was thought: open while nothing else is said, unless it was opened or closed by hand. */
function drawThought(message) {
  const isOpen = message.isThoughtOpen ?? (message.isComing && !message.text);
  const details = element("details", { className: "thought", open: isOpen },
    element("summary", { textContent: "Thinking", onclick: () => (message.isThoughtOpen = !details.open) }),
    element("div", { textContent: message.thought }));
  return details;
}

/** At most once for each picture that the screen shows. */
function drawLater(message) {
  if (message.isPlanned) return;
  message.isPlanned = true;
  requestAnimationFrame(() => {
    message.isPlanned = false;
    const list = $("messages");
    const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    drawText(message);
    if (isAtEnd) list.scrollTop = list.scrollHeight;
  });
}

function edit(item, index) {
  const field = element("textarea", { value: messages[index].text, rows: 3, ariaLabel: "Edited message" });
  const ask = act(async () => {
    const text = field.value.trim();
    if (!text) return;
    await fork(index, "edited");
    await send(text);
  });
  field.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); ask(); }
    if (event.key === "Escape") drawMessages();
  };
  item.replaceChildren(field, element("div", { className: "tools" },
    button("Ask", "Ask this, in a conversation of its own", ask, { className: "ask" }), button("Cancel", "Leave it as it was", drawMessages)));
  field.focus();
}

// -- the cache ---------------------------------------------------------------------------------------------------------

const REASONS = {
  gpu_reclaimed: "its GPU block was wanted; the copy in the CPU tier stays",
  gpu_swapped_out: "its GPU block was wanted; swapped out",
  gpu_dropped: "its GPU block was wanted, and the CPU tier had no room for it",
  cpu_dropped: "its CPU block was wanted",
  cpu_copy_dropped: "its CPU block was wanted; it is still in the GPU tier",
  cpu_reclaimed: "its CPU block was wanted; the copy on disk stays",
  disk_dropped: "its place on disk was wanted",
  disk_copy_dropped: "its place on disk was wanted; it is still in the CPU tier",
};
const STATES = {
  gpu: "in the GPU tier", both: "in both tiers", cpu: "in the CPU tier", disk: "on disk", peer: "in another replica", dropped: "dropped: computed again when wanted",
  computing: "being computed", loading: "on its way to the GPU tier", storing: "on its way to the CPU tier",
};
const RATES = { gpu: "GPU tier", cpu: "CPU tier", disk: "disk", peer: "other replicas", not_loaded: "not loaded", dropped: "dropped", new: "new" };
const MAX_SHOWN_EVICTIONS = 12;
let map = { replicas: [] };
let watching = null; // an AbortController

/** Follow the cache while the page can be seen; while it can't, nothing is asked. */
async function watch() {
  if (watching || document.hidden) return;
  const controller = (watching = new AbortController());
  while (!controller.signal.aborted) {
    try {
      for await (const event of events(await request("GET", "/v1/cache/map", undefined, controller.signal))) {
        if (event.error) throw new ServerError(0, event.error);
        map = event;
        $("live").textContent = "";
        drawCache();
      }
    } catch (error) {
      if (controller.signal.aborted) break;
      $("live").textContent = error.message;
    }
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    watching?.abort();
    watching = null;
  } else {
    watch();
  }
});

function drawCache() {
  $("demo").hidden = !map.demo;
  drawReplicas();
  drawRows();
  drawEvictions();
}

function drawReplicas() {
  const tiers = new Set(map.replicas.flatMap((replica) => replica.tiers.map((tier) => tier.name)));
  for (const entry of document.querySelectorAll("#legend [data-tier]")) entry.hidden = !tiers.has(entry.dataset.tier);
  $("replicas").replaceChildren(...map.replicas.map((replica) => {
    const box = element("div", { className: "replica" });
    if (map.replicas.length > 1) box.append(element("h3", { textContent: `Replica ${replica.replica}` }));
    for (const tier of replica.tiers) {
      const free = tier.blocks - tier.used - tier.held;
      const held = tier.held ? `, ${tier.held} held back` : "";
      box.append(bar(tier.name.toUpperCase(), [[tier.name, tier.used], ["held", tier.held]], tier.blocks,
        `${tier.used} of ${tier.blocks} blocks used, ${free} free${held}`, `tier ${tier.name}`));
    }
    const rates = Object.entries(replica.hit_rates);
    const words = rates.map(([name, rate]) => `${RATES[name] ?? name} ${Math.round(rate * 100)} %`).join(", ");
    box.append(bar("Hits", rates, 1, words ? `Prompt tokens so far: ${words}` : "No prompt so far", "hits"));
    return box;
  }));
}

function bar(name, parts, whole, words, className) {
  const line = element("div", { className: "bar", role: "img", ariaLabel: `${name}: ${words}` });
  for (const [kind, part] of parts) {
    const piece = element("i", { className: kind });
    piece.style.width = `${whole ? (100 * part) / whole : 0}%`;
    line.append(piece);
  }
  return element("div", { className: `bar-line ${className}` }, element("span", { textContent: name }), line,
    element("span", { className: "numbers", textContent: words }));
}

const rows = new Map(); // key -> {node, name, what, cells, selected}
const cellData = new WeakMap();
let pointed = null; // the cell that is described

/** Rows stay the same nodes, so that the pointer stays at its cell, and the keyboard in its row. */
function drawRows() {
  const wanted = new Set();
  const nodes = [];
  for (const replica of map.replicas) {
    for (const conversation of replica.conversations) {
      const key = `${replica.replica} ${conversation.tenant} ${conversation.id}`;
      wanted.add(key);
      if (!rows.has(key)) rows.set(key, makeRow());
      drawRow(rows.get(key), replica, conversation);
      nodes.push(rows.get(key).node);
    }
  }
  for (const key of rows.keys()) if (!wanted.has(key)) rows.delete(key);
  const list = $("rows");
  if (nodes.length !== list.children.length || nodes.some((node, index) => node !== list.children[index])) {
    const focused = document.activeElement;
    list.replaceChildren(...nodes);
    if (list.contains(focused)) focused.focus();
  }
  if (pointed) describe(pointed);
}

function makeRow() {
  const name = element("span", { className: "name" });
  const what = element("span", { className: "what" });
  const cells = element("div", { className: "cells", tabIndex: 0, role: "group" });
  const row = { name, what, cells, selected: -1, node: element("li", { className: "row" }, element("div", { className: "head" }, name, what), cells) };
  cells.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    select(row, Math.max(0, Math.min(cells.children.length - 1, row.selected + step)));
  };
  cells.onblur = () => select(row, -1);
  cells.onpointerover = (event) => cellData.has(event.target) && describe(event.target);
  return row;
}

function select(row, index) {
  row.cells.children[row.selected]?.classList.remove("selected");
  row.selected = index;
  const cell = row.cells.children[index];
  if (cell) {
    cell.classList.add("selected");
    describe(cell);
  }
}

function drawRow(row, replica, conversation) {
  const { cells } = conversation;
  const title = titleOf(conversation.id) ?? conversation.id;
  const place = map.replicas.length > 1 ? ` · replica ${replica.replica}` : "";
  const left = conversation.num_chunks - cells.length;
  const more = left > 0 && cells.length ? ` · ${left} more` : "";
  const tenant = map.operator && conversation.tenant !== "local" ? `${conversation.tenant}: ` : "";
  row.node.classList.toggle("current", conversation.id === current);
  row.node.dataset.conversation = conversation.id;
  row.name.textContent = tenant + title;
  row.name.title = conversation.id;
  row.what.textContent = `${conversation.status} · ${conversation.num_chunks} chunks${more}${place}`;
  while (row.cells.children.length > cells.length) row.cells.lastChild.remove();
  while (row.cells.children.length < cells.length) row.cells.append(element("i"));
  let start = 0;
  cells.forEach((cell, index) => {
    const node = row.cells.children[index];
    const className = `cell ${cell.state}${index === row.selected ? " selected" : ""}`;
    if (node.className !== className) node.className = className;
    cellData.set(node, { ...cell, index, start: index * replica.chunk_size, title });
  });
  const counts = {};
  for (const { state } of cells) counts[state] = (counts[state] ?? 0) + 1;
  row.cells.ariaLabel = `${title}: ${Object.entries(counts).map(([state, number]) => `${number} ${state}`).join(", ")}`;
}

function describe(cell) {
  pointed = cell;
  const data = cellData.get(cell);
  if (!data || !cell.isConnected) return;
  const end = data.start + Math.max(data.tokens, 1) - 1;
  const idle = data.idle_s === null ? (data.state === "dropped" ? "" : "; in use") : `; idle for ${seconds(data.idle_s)}`;
  const value = data.retention_value === null ? "" : `; retention value ${number(data.retention_value)} (the smallest goes first)`;
  $("detail").textContent = `${data.title}, chunk ${data.index}, tokens ${data.start} to ${end}: ${STATES[data.state] ?? data.state}${idle}${value}.`;
}

function drawEvictions() {
  const all = map.replicas.flatMap((replica) => replica.evictions.map((eviction) => ({ ...eviction, replica: replica.replica })));
  all.sort((a, b) => a.ago_s - b.ago_s);
  $("evictions").replaceChildren(...(all.length ? all.slice(0, MAX_SHOWN_EVICTIONS).map(drawEviction) : [
    element("li", { textContent: "None since this page looks." }),
  ]));
}

function drawEviction(eviction) {
  const whose = eviction.conversation ? titleOf(eviction.conversation) ?? eviction.conversation : "a conversation that is not shown";
  const value = eviction.retention_value === null ? "" : `, retention value ${number(eviction.retention_value)}`;
  const item = element("li", {}, element("b", { textContent: `${eviction.from.toUpperCase()} → ${eviction.to.toUpperCase()}` }),
    ` chunk ${eviction.position} of ${whose}, ${seconds(eviction.ago_s)} ago: ${REASONS[eviction.reason] ?? eviction.reason}. ` +
    `It was idle for ${seconds(eviction.idle_s)}${value}.`);
  item.dataset.reason = eviction.reason;
  return item;
}

const seconds = (value) => (value < 10 ? `${value.toFixed(1)} s` : value < 120 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`);
const number = (value) => new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);

/** As many blocks of each tier stay in use as half of what the GPU tier of the replica that uses most has used. */
async function shrink() {
  const used = Math.max(...map.replicas.map((replica) => replica.tiers[0].used));
  const left = Math.max(2, Math.ceil(used / 2));
  await ask("POST", "/v1/cache/demo", { gpu_blocks: left, cpu_blocks: left });
}

// -- the start ---------------------------------------------------------------------------------------------------------

$("new").onclick = act(async () => {
  await open(null);
  $("input").focus();
});
$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || running || !model) return;
  $("input").value = "";
  act(send)(text);
};
$("input").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
};
$("stop").onclick = () => stop();
$("shrink").onclick = act(shrink);
$("restore").onclick = act(() => ask("POST", "/v1/cache/demo", {}));
$("key-button").onclick = act(() => askForKey(""));

act(async () => {
  $("key-button").hidden = !sessionStorage.getItem(KEY);
  drawConversations();
  model = (await ask("GET", "/v1/models")).data[0].id;
  $("model").textContent = model;
  watch();
  const [first] = conversations();
  if (first) await open(first.id);
  $("input").focus();
})();
