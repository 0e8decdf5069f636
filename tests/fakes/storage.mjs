// Supabase Storage's way with an upload of a key that is stored, on the HTTP server that Storage itself runs on
// (Node's): the answer is given while the body is still on its way, the connection stays open, and what is left of the
// body stands in it before the next request. Objects are in memory. Prints its port.
import { createServer } from "node:http";
import { PassThrough } from "node:stream";

const stored = new Map();
const asked = [];
const missing = { statusCode: "404", error: "not_found", code: "NoSuchKey", message: "Object not found" };
const taken = { statusCode: "409", error: "Duplicate", code: "KeyAlreadyExists", message: "The resource already exists" };

async function read(request) {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  return Buffer.concat(chunks);
}

const server = createServer(async (request, response) => {
  const answer = (status, form) => {
    response.writeHead(status, { "content-type": "application/json" });
    response.end(JSON.stringify(form));
  };
  const path = request.url.split("?")[0].replace("/storage/v1/object/", "");
  if (path === "/asked") return answer(200, asked);
  asked.push(`${request.method} ${path}`);
  if (path.startsWith("sign/")) {
    await read(request);
    const there = stored.has(path.replace("sign/", ""));
    return there ? answer(200, { signedURL: `/object/${path}?token=t` }) : answer(400, missing);
  }
  if (request.method === "GET") {
    const content = stored.get(path.replace("authenticated/", ""));
    if (content === undefined) return answer(400, missing);
    response.writeHead(200, { "content-length": content.length });
    return response.end(content);
  }
  if (stored.has(path) && request.headers["x-upsert"] !== "true") {
    request.pipe(new PassThrough()); // begun and left, as Storage leaves it
    return setTimeout(() => answer(400, taken), 20);
  }
  stored.set(path, await read(request));
  return answer(200, { Key: path });
});
server.keepAliveTimeout = 72_000; // Fastify's
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
