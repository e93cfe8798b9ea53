// The page: what is changed is asked at once, what takes long (plans) when the form has been quiet for a moment.
import { ask, inBrowser } from "./engine.js";
import { offer } from "./fields.js";
import { fromFragment, read, toFragment, write } from "./form.js";
import { showError, showEstimate, showPlans, showPlanState } from "./results.js";

const $ = (id) => document.getElementById(id);
const QUIET = 400; // milliseconds before plans are searched
let answer = null;

/** Runs one question at a time; of those asked meanwhile only the last. Stale answers are dropped. */
function latest(question, onAnswer, onError) {
  let running = false;
  let next = null;
  return async function run(body) {
    next = body;
    if (running) return;
    running = true;
    while (next) {
      const asked = next;
      next = null;
      try {
        const found = await ask(question, asked);
        if (!next) onAnswer(found, asked);
      } catch (error) {
        if (!next) onError(error.message, asked);
      }
    }
    running = false;
  };
}

const estimate = latest("estimate", onEstimate, onEstimateError);
const plan = latest("plan", onPlan, showPlanState);
const emit = latest("emit", ({ text }) => ($("emit").textContent = text), (sentence) => ($("emit").textContent = sentence));

function onEstimate(found, settings) {
  answer = { ...found, settings };
  showError("");
  draw();
  $("results").setAttribute("aria-busy", "false");
  document.dispatchEvent(new CustomEvent("memopt:answer", { detail: answer }));
}

function onEstimateError(sentence, settings) {
  showError(sentence);
  $("results").setAttribute("aria-busy", "false");
  document.dispatchEvent(new CustomEvent("memopt:answer", { detail: { error: sentence, settings } }));
}

function draw() {
  const spec = showEstimate(answer, draw);
  const { optim, ...others } = answer.settings;
  emit({ ...others, optim: [spec], kind: $("kind").value });
}

function onPlan(found) {
  showPlans(found, take);
  document.dispatchEvent(new CustomEvent("memopt:plan", { detail: found }));
}

function take(settings) {
  write({ ...read(), ...settings });
  changed();
  $("results").focus();
}

let quiet = 0;

/** Ask for what the form holds. */
function refresh() {
  const settings = read();
  $("specs").classList.toggle("single", (settings.world ?? "1") === "1" && !settings.deepspeed);
  estimate(settings);
  clearTimeout(quiet);
  if (!settings.gpu) showPlanState("Name a card, and configurations that fit it are searched.");
  else if (!settings.seq) showPlanState("Say a sequence length, and configurations that fit the card are searched.");
  else {
    showPlanState("Searching configurations that fit …");
    quiet = setTimeout(() => plan(settings), QUIET);
  }
}

function changed() {
  history.replaceState(null, "", `#${toFragment(read())}`);
  refresh();
}

/** The settings of the link, or those that the page begins with. */
function fromLink() {
  if (location.hash.length < 2 || location.hash === "#results") return false;
  const unknown = write(fromFragment(location.hash));
  if (unknown.length) say(`The link has settings that this page does not know: ${unknown.join(", ")}.`);
  return true;
}

let talking = 0;

function say(sentence) {
  $("said").textContent = sentence;
  clearTimeout(talking);
  talking = setTimeout(() => ($("said").textContent = ""), 4000);
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${what} copied.`);
  } catch {
    say("The browser does not let this page copy; mark the text and copy it.");
  }
}

function wire() {
  $("settings").addEventListener("input", changed);
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("kind").addEventListener("change", () => answer && draw());
  $("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the fragment holds the settings
    $("results").focus();
  });
  $("reset").addEventListener("click", () => {
    $("settings").reset();
    changed();
  });
  $("copy-link").addEventListener("click", () => copy(`${location.href.split("#")[0]}#${toFragment(read())}`, "Link"));
  $("copy-emit").addEventListener("click", () => copy($("emit").textContent, "Configuration"));
  $("copy-command").addEventListener("click", () => copy($("command").textContent, "Command"));
  $("copy-json").addEventListener("click", () => copy(JSON.stringify(answer?.estimate, null, 2), "JSON"));
  window.addEventListener("hashchange", () => fromLink() && refresh());
}

async function begin() {
  $("where").textContent = inBrowser
    ? "Computed in this browser; nothing is sent anywhere."
    : "Computed by memopt on this machine; nothing is sent anywhere else.";
  if (inBrowser) $("title").textContent = "Starting Python in this browser …";
  try {
    const choices = await ask("choices", {});
    offer(choices);
    $("where").textContent += ` memopt ${choices.version}.`;
  } catch (error) {
    $("title").textContent = "No answer";
    showError(error.message);
    return;
  }
  wire();
  fromLink();
  refresh();
}

begin();
