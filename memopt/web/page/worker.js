// Python in this browser: Pyodide and the packed sources, both from this site.
import { loadPyodide } from "./pyodide/pyodide.mjs";

const respond = (async () => {
  const [python, packed] = await Promise.all([
    loadPyodide({ indexURL: new URL("pyodide/", self.location.href).href }),
    fetch("memopt.zip").then((reply) => reply.arrayBuffer()),
  ]);
  python.unpackArchive(packed, "zip", { extractDir: "/memopt" });
  python.runPython("import sys; sys.path.insert(0, '/memopt')");
  const api = python.pyimport("memopt.web.api");
  const encode = new TextEncoder();
  return (question, body) => {
    const bytes = python.toPy(encode.encode(body)).tobytes();
    const answer = api.respond(question, bytes);
    const found = answer.toJs();
    answer.destroy();
    bytes.destroy?.();
    return found;
  };
})();

onmessage = async ({ data: { id, question, body } }) => {
  try {
    const [status, text] = (await respond)(question, body);
    postMessage({ id, status, text });
  } catch (error) {
    postMessage({ id, failed: `Python in this browser failed: ${String(error).split("\n").at(-1) || error}` });
  }
};
