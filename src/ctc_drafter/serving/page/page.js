"use strict";
// Chat with the model, and see which tokens of each step the drafter had guessed. Text enters the page as text only.

const $ = (id) => document.getElementById(id);
const IDEAS = [
  "Tom has 3 apples and buys 5 more. How many has he?",
  "Give three tips for staying healthy.",
  "Write a short poem about rain.",
  "Explain what a function is in programming.",
];
const state = { model: null, messages: [], asking: false, running: null };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------- the server

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  if (response.status === 401) {
    $("keyfield").hidden = false;
    $("settings").open = true;
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

async function connect() {
  const status = $("model");
  status.classList.remove("bad");
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await failure(response));
    state.model = (await response.json()).data[0];
    const { id, drafter, max_model_len: context } = state.model;
    status.textContent = drafter === "none" ? `${id}, no drafter` : `${id} with drafter ${drafter}, context ${context}`;
    if (drafter === "none") {
      document.querySelector("[value=plain]").checked = true;
      $("modes").hidden = true;
    }
  } catch (error) {
    state.model = null;
    status.textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
    status.classList.add("bad");
  }
}

async function* events(body, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await fetch("v1/chat/completions", options);
  if (!response.ok) throw new Error(await failure(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke before the answer was complete.");
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// ---------------------------------------------------------------- answers

class Answer {
  constructor(drafter) {
    this.drafter = drafter;
    this.text = "";
    this.tokens = this.accepted = this.steps = this.seconds = 0;
    this.finished = false;
    this.numbers = {};
    const list = make("dl");
    for (const name of drafter === "none" ? ["tokens/s", "tokens"] : ["tokens/s", "tau", "tokens"]) {
      this.numbers[name] = make("dd", {}, "–");
      list.append(make("div", {}, make("dt", {}, name), this.numbers[name]));
    }
    list.title = "tokens/s by the time that the model took for this answer; tau: tokens per pass of the model";
    const title = make("h2", {}, drafter === "none" ? "plain" : `drafted by ${drafter}`);
    this.body = make("p", { class: "text" });
    this.element = make("article", { class: "answer live" }, make("header", {}, title, list), this.body);
  }

  get speed() { return this.tokens / this.seconds; }

  get passes() { return this.steps + 1; }

  add(chunk) {
    const told = chunk.ctc_drafter;
    if (!told) return;
    this.tokens += told.tokens;
    this.seconds += told.seconds;
    if (!told.prefill) {
      this.steps += 1;
      this.accepted += told.accepted;
    }
    this.append(told);
    this.finished ||= chunk.choices[0].finish_reason !== null;
    this.numbers["tokens/s"].textContent = this.speed.toFixed(0);
    this.numbers.tokens.textContent = this.tokens;
    if (this.numbers.tau && this.steps) this.numbers.tau.textContent = ((this.tokens - 1) / this.steps).toFixed(2);
  }

  append(told) {
    const step = make("span", { class: "step", tabindex: this.body.childElementCount ? "-1" : "0" });
    for (const [text, accepted] of told.pieces) {
      step.append(accepted ? make("span", { class: "run" }, text) : text);
      this.text += text;
    }
    step.told = told;
    step.setAttribute("role", "note");
    step.setAttribute("aria-label", `${step.textContent} (${summary(told)})`);
    this.body.append(step);
  }

  fail(message) { this.element.append(make("p", { class: "error", role: "alert" }, message)); }
}

function summary(told) {
  if (told.prefill) return "first token, from reading the prompt";
  if (!told.drafted) return "one token, nothing drafted";
  return `${told.accepted} of ${told.drafted} drafted tokens accepted, ${told.tokens} in one pass`;
}

function request(drafter) {
  const body = {
    model: state.model.id,
    messages: state.messages,
    stream: true,
    temperature: Number($("temperature").value),
    max_tokens: Number($("length").value) || 200,
    ctc_drafter: { steps: true, tree: drafter !== "none", drafter },
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return body;
}

async function fill(answer, signal) {
  try {
    for await (const chunk of events(request(answer.drafter), signal)) {
      const low = $("chat").scrollHeight - $("chat").scrollTop - $("chat").clientHeight < 60;
      answer.add(chunk);
      if (low) $("chat").scrollTop = $("chat").scrollHeight;
      place(); // a word that grows may have taken its step to the next line
    }
  } catch (error) {
    if (error.name !== "AbortError") answer.fail(error instanceof TypeError ? "The connection to the server broke." : error.message);
  } finally {
    answer.element.classList.remove("live");
  }
}

async function ask(text, sent = () => {}) {
  // Until the model is known nothing is sent, so the text stays where it was written, and a second click waits too.
  if (state.asking) return;
  state.asking = true;
  try {
    if (!state.model) await connect();
    if (!state.model) return;
    sent();
    await converse(text);
  } finally {
    state.asking = false;
  }
}

async function converse(text) {
  $("welcome").hidden = true;
  const messages = state.messages;
  messages.push({ role: "user", content: text });
  const mode = document.querySelector("[name=mode]:checked").value;
  const kinds = { drafted: [state.model.drafter], plain: ["none"], both: ["none", state.model.drafter] }[mode];
  const answers = kinds.map((kind) => new Answer(kind));
  const row = make("div", { class: mode === "both" ? "answers both" : "answers" }, ...answers.map((a) => a.element));
  $("chat").append(make("div", { class: "ask" }, make("p", {}, text)), row);
  $("chat").scrollTop = $("chat").scrollHeight;
  state.running = new AbortController();
  $("send").textContent = "Stop";
  await Promise.all(answers.map((answer) => fill(answer, state.running.signal)));
  state.running = null;
  $("send").textContent = "Send";
  if (state.messages !== messages) return; // a new conversation has begun meanwhile
  const last = answers[answers.length - 1];
  if (last.text) state.messages.push({ role: "assistant", content: last.text });
  else state.messages.pop();
  if (mode === "both" && answers.every((a) => a.finished)) {
    $("chat").append(verdict(...answers));
    $("chat").scrollTop = $("chat").scrollHeight;
  }
}

function verdict(plain, drafted) {
  let same = plain.text === drafted.text ? "The same text in " : "The texts differ (in low precision near-ties can swap): ";
  if (Number($("temperature").value) > 0) same = "Two samples of one distribution: ";
  const passes = make("strong", {}, `${drafted.passes} passes instead of ${plain.passes}`);
  const speed = (drafted.speed / plain.speed).toFixed(2);
  return make("p", { class: "verdict", role: "status" }, same, passes, ` of the model, at ${speed} times the speed.`);
}

// ---------------------------------------------------------------- the box of the draft tree

let shown = null; // the step whose tree is on the page

function show(step) {
  if (step !== shown) draw(step);
  $("tree").classList.toggle("held", step !== null && step === focused());
  place();
}

function draw(step) {
  if (shown) shown.classList.remove("shown");
  shown = step;
  const box = $("tree");
  box.hidden = !step;
  if (!step) return;
  step.classList.add("shown");
  const { tree } = step.told;
  box.replaceChildren(make("p", {}, summary(step.told)), ...(tree && tree.length ? [picture(tree)] : []));
  if (tree && tree.length) box.append(make("p", { class: "key" }, "Per cent: the drafter’s probability of the path so far."));
  box.style.maxHeight = "";
  box.scrollTo(0, 0);
}

function place() {
  // Below the step, or above it where there is more room; a larger tree scrolls within. Away while its step is.
  if (!shown) return;
  const box = $("tree"), at = shown.getBoundingClientRect(), view = $("chat").getBoundingClientRect();
  const height = box.scrollHeight + box.offsetHeight - box.clientHeight, space = innerHeight - at.bottom;
  const below = height + 16 <= space || space >= at.top;
  box.style.maxHeight = `${Math.max(below ? space : at.top, 120) - 16}px`;
  const size = box.getBoundingClientRect(), top = below ? at.bottom + 8 : at.top - size.height - 8;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  box.style.top = `${Math.max(8, Math.min(top, innerHeight - size.height - 8))}px`;
  box.style.visibility = at.bottom < view.top || at.top > view.bottom ? "hidden" : "visible";
}

// ---------------------------------------------------------------- events of the page

const stepOf = (event) => (event.target.closest ? event.target.closest(".text .step") : null);

// The tree shown is that of the step under the mouse or the one with focus: the one that the reader moved to last.
let pointed = null, dismissed = false;
const focused = () => (dismissed ? null : document.activeElement.closest(".text .step"));

function point(event) {
  const step = stepOf(event);
  if (event.pointerType === "touch" || step === pointed) return;
  pointed = step;
  show(pointed || focused());
}

function hold(step) {
  pointed = null;
  dismissed = false;
  show(step);
}

$("chat").addEventListener("pointermove", point);
$("chat").addEventListener("pointerover", (event) => {
  if (pointed || !focused()) point(event); // a resting mouse, below which the arrow keys scroll text, points at nothing
});
$("chat").addEventListener("pointerleave", () => {
  pointed = null;
  show(focused());
});
$("chat").addEventListener("focusin", (event) => hold(stepOf(event)));
$("chat").addEventListener("focusout", () => show(pointed));
$("chat").addEventListener("scroll", place);
window.addEventListener("resize", place);
$("chat").addEventListener("click", (event) => {
  const step = stepOf(event);
  if (!step) return;
  step.focus();
  hold(step);
});
document.addEventListener("pointerup", (event) => {
  const kept = stepOf(event) || $("tree").contains(event.target);
  if (event.pointerType === "touch" && !kept && focused()) focused().blur(); // not every phone does so itself
});
$("tree").addEventListener("mousedown", (event) => event.preventDefault()); // which would take the focus off the step
$("chat").addEventListener("keydown", (event) => {
  const step = stepOf(event);
  const far = step && event.shiftKey && { ArrowLeft: [-80, 0], ArrowRight: [80, 0], ArrowUp: [0, -80], ArrowDown: [0, 80] }[event.key];
  if (far) {
    event.preventDefault();
    $("tree").scrollBy(...far);
    return;
  }
  const next = step && { ArrowRight: step.nextElementSibling, ArrowLeft: step.previousElementSibling,
    Home: step.parentElement.firstElementChild, End: step.parentElement.lastElementChild }[event.key];
  if (!next) return;
  event.preventDefault();
  step.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (shown) {
    dismissed = true;
    show(null);
  } else if (state.running) state.running.abort();
});

const fit = () => {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
};
$("text").addEventListener("input", fit);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) {
    state.running.abort();
    return;
  }
  const text = $("text").value.trim();
  if (!text) return;
  ask(text, () => {
    if ($("text").value.trim() !== text) return; // it was written on meanwhile
    $("text").value = "";
    fit();
  });
});
$("key").addEventListener("change", connect);
$("reset").addEventListener("click", () => {
  if (state.running) state.running.abort();
  state.messages = [];
  hold(null);
  for (const element of [...$("chat").children]) if (element.id !== "welcome") element.remove();
  $("welcome").hidden = false;
  $("text").focus();
});
for (const idea of IDEAS) {
  const button = make("button", { type: "button" }, idea);
  button.addEventListener("click", () => ask(idea));
  $("ideas").append(button);
}
connect();
