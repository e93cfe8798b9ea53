// Who answers: the server on this machine, or the same Python in a worker of this browser.

export const inBrowser = document.documentElement.dataset.engine === "pyodide";

/** The answer to a question (memopt/web/api.py), or an Error with one sentence. */
export async function ask(question, body) {
  const [status, text] = await (inBrowser ? askWorker(question, body) : askServer(question, body));
  const answer = JSON.parse(text);
  if (status !== 200) throw new Error(answer.error);
  return answer;
}

async function askServer(question, body) {
  let reply;
  try {
    reply = await fetch(`api/${question}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error("The server does not answer; is memopt web still running?");
  }
  return [reply.status, await reply.text()];
}

// Plans take seconds: a worker of their own, so that an estimate never waits for one.
const workers = {};

function askWorker(question, body) {
  const name = question === "plan" ? "plans" : "estimates";
  const worker = (workers[name] ??= start());
  const id = ++worker.asked;
  return new Promise((resolve, reject) => {
    worker.waiting.set(id, { resolve, reject });
    worker.thread.postMessage({ id, question, body: JSON.stringify(body) });
  });
}

function start() {
  const thread = new Worker("worker.js", { type: "module" });
  const waiting = new Map();
  thread.onmessage = ({ data }) => {
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.failed) reject(new Error(data.failed));
    else resolve([data.status, data.text]);
  };
  thread.onerror = () => {
    for (const { reject } of waiting.values()) reject(new Error("Python could not be started in this browser."));
    waiting.clear();
  };
  return { thread, waiting, asked: 0 };
}
