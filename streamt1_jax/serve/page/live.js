// The live page: what the server tells is drawn, what a person asks for is sent. All text is set as text, never as HTML.
"use strict";

const KEEP_BEHIND = 20, MOST_AHEAD = 5, MOST_COLUMNS = 32, MOST_HISTORY = 50, MOST_QUEUED = 32;
const $ = (id) => document.getElementById(id);
const video = $("video");
let socket = null, expects = null, mine = null, waits = false, running = null, paused = false, ready = true, warm = true;
let fps = 16, nextId = 1, retry = 1, mostImage = Infinity;
const page = Math.random().toString(36).slice(2); // Pages of others number their prompts too.

const make = (tag, className = "", textContent = "") => Object.assign(document.createElement(tag), { className, textContent });
const drawn = (tag, attributes, text = "") => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
};
const seconds = (value) => `${value.toFixed(2)} s`;
const score = (value) => (typeof value === "number" ? value.toFixed(3) : "\u2013");
const clock = (value) => `${Math.floor(value / 60)}:${String(Math.floor(value % 60)).padStart(2, "0")}`;

const notice = (text) => Object.assign($("notice"), { textContent: text, hidden: !text });

// The player: fragments go into one buffer that is trimmed, so that a video may run for ever.
const player = {
  source: null, buffer: null, queue: [], seen: false,
  possible: (mime) => "MediaSource" in window && MediaSource.isTypeSupported(mime),
  begin() {
    if (this.source) URL.revokeObjectURL(video.src);
    Object.assign(this, { source: null, buffer: null, queue: [], seen: false });
    $("still").hidden = true;
  },
  open(mime) {
    const source = (this.source = new MediaSource());
    source.addEventListener("sourceopen", () => {
      if (source !== this.source) return;
      this.buffer = source.addSourceBuffer(mime);
      this.buffer.addEventListener("updateend", () => this.pump());
      this.pump();
    }, { once: true });
    video.src = URL.createObjectURL(source);
  },
  add(mime, bytes) {
    this.seen = true;
    $("waiting").hidden = true;
    if (!this.possible(mime))
      return notice("This browser plays no video that is still being made (MediaSource). It shows pictures of every chunk instead.");
    if (!this.source) this.open(mime);
    this.queue.push(bytes);
    // A browser that does not play, as in a hidden tab, does not gather video without an end.
    if (this.queue.length > MOST_QUEUED) this.queue.splice(1, this.queue.length - MOST_QUEUED);
    this.pump();
  },
  pump() {
    const buffer = this.buffer;
    if (!buffer || buffer.updating || video.error) return;
    const ranges = buffer.buffered;
    if (ranges.length && ranges.start(0) < video.currentTime - KEEP_BEHIND - 5) {
      buffer.remove(0, video.currentTime - KEEP_BEHIND);
      return;
    }
    if (this.queue.length) {
      try {
        buffer.appendBuffer(this.queue[0]);
        this.queue.shift();
      } catch (error) {
        if (error.name !== "QuotaExceededError" || !ranges.length) return notice(`The video cannot go on: ${error.message}`);
        buffer.remove(0, Math.max(ranges.start(0) + 0.1, video.currentTime - 1));
      }
    }
    this.follow();
  },
  // A viewer who came late, missed chunks, or was away goes on with what is there.
  follow() {
    const ranges = video.buffered;
    if (!ranges.length) return;
    const end = ranges.end(ranges.length - 1), begin = ranges.start(ranges.length - 1);
    const inside = [...Array(ranges.length).keys()].some((i) => ranges.start(i) <= video.currentTime + 0.05 && video.currentTime < ranges.end(i) - 0.02);
    if (!inside && begin > video.currentTime) video.currentTime = begin;
    if (end - video.currentTime > MOST_AHEAD && !paused) video.currentTime = Math.max(begin, end - 1);
    if (!paused && video.paused) video.play().catch(() => {});
  },
  get ahead() {
    const ranges = video.buffered;
    return ranges.length ? Math.max(0, ranges.end(ranges.length - 1) - video.currentTime) : 0;
  },
};

// The candidates of the chunk that is being made, and the ribbon of those before.
const search = {
  chunks: [],
  clear() {
    this.chunks = [];
    $("candidates").replaceChildren();
  },
  candidates(told) {
    const index = told.generation_chunk_index;
    $("heading").textContent = `Candidates of chunk ${index}`;
    if (told.state === "running") {
      $("route").textContent = "are being made";
      // The pictures of the chunk before stay, faint, until there are others.
      const before = [...$("candidates").querySelectorAll("img")].map((image) => image.src);
      $("candidates").replaceChildren(...Array.from({ length: told.count }, (_, number) => this.card({ candidate: number, strip: before[number] })));
      return;
    }
    const kept = new Set(told.survivors);
    $("route").textContent = ROUTES[told.candidates.find((each) => each.rank === 0).route];
    $("candidates").replaceChildren(...told.candidates.map((each) => this.card(each, kept)));
    this.chunks.push({ index, candidates: told.candidates, kept, won: null, switched: false });
    if (this.chunks.length > MOST_COLUMNS) this.chunks.shift();
    this.draw();
  },
  card(each, kept) {
    const item = make("li", kept ? (each.rank === 0 ? "winner" : kept.has(each.candidate) ? "" : "lost") : "running");
    item.dataset.candidate = each.candidate;
    const picture = each.strip ? make("img", "picture") : make("div", "picture");
    if (each.strip) { picture.src = each.strip; picture.alt = `Three frames of candidate ${each.candidate}`; }
    const name = make("p", "name", `Candidate ${each.candidate}`);
    name.append(make("span", "", kept ? each.fate : "\u2026"));
    const list = make("dl");
    list.append(...[["short", "image"], ["long", "video"], ["hybrid", "hybrid"]].map(([field, label]) => {
      const pair = make("div");
      pair.append(make("dt", "", label), make("dd", field, kept ? score(each[field]) : "\u2026"));
      return pair;
    }));
    item.append(picture, name, list);
    return item;
  },
  shown(told) {
    const chunk = this.chunks.find((each) => each.index === told.generation_chunk_index);
    if (chunk) Object.assign(chunk, { won: told.winner, switched: told.started_event_ids.length > 0 });
    const won = chunk?.candidates.find((each) => each.candidate === told.winner);
    if (won?.strip && !player.possible(told.mime)) Object.assign($("still"), { src: won.strip, hidden: false });
    this.draw();
  },
  draw() {
    const rows = Math.max(1, ...this.chunks.map((each) => each.candidates.length));
    const svg = $("ribbon"), width = 20 * MOST_COLUMNS, height = 16 * rows + 26, points = [];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const marks = this.chunks.flatMap((chunk, column) => {
      const x = 20 * column + 10;
      const found = chunk.candidates.map((each, row) => {
        const won = each.candidate === chunk.won, y = 16 * row + 10;
        if (won) points.push(`${x},${y}`);
        return drawn("circle", { cx: x, cy: y, r: won ? 5.5 : 4, class: won ? "won" : chunk.kept.has(each.candidate) ? "kept" : "lost" });
      });
      if (chunk.switched) found.unshift(drawn("line", { x1: x - 10, x2: x - 10, y1: 0, y2: height - 20, class: "switch" }));
      return [...found, drawn("text", { x, y: height - 4, class: "axis-label" }, chunk.index % 4 ? "" : chunk.index)];
    });
    svg.replaceChildren(drawn("path", { d: points.length > 1 ? `M${points.join("L")}` : "" }), ...marks);
  },
};

const ROUTES = {
  nothing: "nothing has left the memory yet", discard: "the oldest chunk was discarded",
  ema: "the oldest chunk was merged into a sink", append: "the oldest chunk became a sink",
  append_at_maximum: "the oldest chunk became a sink, at the maximum",
};

function remember(prompt, state, id) {
  const known = id && [...$("history").children].find((each) => each.dataset.id === id);
  if (known) return known.lastChild.replaceChildren(state);
  const item = make("li"), again = make("button", "", prompt);
  item.dataset.id = id || "";
  again.type = "button";
  again.addEventListener("click", () => { $("prompt").value = prompt; $("prompt").focus(); });
  item.append(again, make("span", "", state));
  $("history").prepend(item);
  if ($("history").children.length > MOST_HISTORY) $("history").lastChild.remove();
}

function show() {
  const steers = mine !== null && mine === running, later = !steers && (waits || mine !== null);
  $("send").textContent = steers ? "Switch" : later ? "Waiting" : "Start";
  $("send").disabled = later;
  $("begin").hidden = steers;
  $("steer").hidden = !steers && !later;
  for (const id of ["pause", "save"]) $(id).disabled = !steers;
  $("pause").textContent = paused ? "Resume" : "Pause";
  $("state").textContent = running === null ? (ready ? "idle" : "compiling") : paused ? "paused" : steers ? "running" : "watching";
  $("state").classList.toggle("running", running !== null && !paused);
}

const takes = {
  "session.hello"(told) {
    $("search").replaceChildren(...told.presets.map((name) => make("option", "", name)));
    [ready, retry, mostImage] = [told.ready, 1, told.most_image_bytes];
    notice("");
  },
  "server.ready"() { ready = true; },
  "session.queued"(told) { waits = true; notice(`Somebody else has the session. Your place in the line: ${told.place}.`); },
  "session.accepted"(told) {
    [mine, waits, warm] = [told.request_id, false, told.warm];
    notice(warm ? "" : "This search has not run yet. Its programs are compiled first, which may take a minute.");
  },
  "video.start"(told) {
    running = told.request_id;
    fps = told.config.fps;
    player.begin();
    search.clear();
    $("waiting").textContent = "The first chunk is being made.";
    $("waiting").hidden = false;
    $("prompt-now").textContent = told.prompt;
    if (mine === running) remember(told.prompt, "0:00");
  },
  "search.candidates": (told) => search.candidates(told),
  "video.chunk_metadata"(told) {
    expects = told;
    if (!warm) notice("");
    warm = true;
    search.shown(told);
    $("prompt-now").textContent = told.prompt;
    const media = told.num_frames / fps;
    $("m-chunk").textContent = seconds(told.making_seconds);
    $("g-chunk").value = told.making_seconds / media;
    $("m-factor").textContent = (told.making_seconds / media).toFixed(2);
    $("m-lag").textContent = seconds(told.behind_seconds);
  },
  "session.interaction.applied": (told) => remember(told.prompt, `from chunk ${told.generation_chunk_index}`, told.event_id),
  "session.interaction.superseded": (told) => remember(told.prompt, "a newer one came", told.event_id),
  "session.interaction.unchanged": (told) => remember(told.prompt, "was in force already", told.event_id),
  "session.interaction.failed": (told) => remember(told.prompt, told.reason, told.event_id),
  "session.interaction.dropped": (told) => remember(told.prompt, "came too late", told.event_id),
  "session.paused"() { paused = true; video.pause(); },
  "session.resumed"() { paused = false; player.follow(); },
  "session.saved"(told) { notice(`Saved in ${told.folder}: ${told.chunks} chunks.${told.no_report ? ` There is no report: ${told.no_report}` : ""}`); },
  "session.done"(told) {
    if (told.request_id === mine || !told.request_id) [mine, waits] = [null, false];
    if (told.request_id === running) running = null;
    paused = false;
    if (told.reason === "time") notice("The session has reached its longest time.");
    $("prompt-now").textContent = told.seconds ? `${clock(told.seconds)} were made` : "";
    if (!player.seen) $("waiting").textContent = "Nothing is running. Say what to show.";
  },
  error(told) {
    notice(told.message);
    if (told.event_id) remember("", told.message, told.event_id);
  },
};

const say = (type, fields) => socket.readyState === WebSocket.OPEN && socket.send(JSON.stringify({ type, ...fields }));

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/realtime/video`);
  socket.binaryType = "arraybuffer";
  socket.addEventListener("message", ({ data }) => {
    if (typeof data !== "string") {
      if (expects) player.add(expects.mime, data);
      expects = null;
      return;
    }
    const told = JSON.parse(data), take = takes[told.type];
    if (take) take(told);
    show();
  });
  socket.addEventListener("close", () => {
    [mine, running, waits, paused] = [null, null, false, false];
    notice("The server is not there. The page tries again.");
    show();
    setTimeout(connect, 1000 * (retry = Math.min(2 * retry, 16)));
  });
}

const base64 = (file) => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
  reader.onerror = () => failed(reader.error);
  reader.readAsDataURL(file);
});

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const prompt = $("prompt").value.trim();
  if (!prompt) return;
  if (mine !== null && mine === running) {
    const event_id = `${page}-${nextId++}`;
    remember(prompt, "queued", event_id);
    say("session.interaction", { interaction: { event_id, event: { prompt } } });
  } else {
    const file = $("image").files[0], fields = { prompt, search: $("search").value, seed: Number($("seed").value) || 0 };
    if (file && file.size > mostImage) return notice(`A picture may have ${mostImage / 2 ** 20} MB. This one has ${(file.size / 2 ** 20).toFixed(1)}.`);
    if (file) fields.image = await base64(file);
    say("session.start", fields);
  }
  $("prompt").select();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form").requestSubmit(); }
});
const asks = { pause: () => (paused ? "session.resume" : "session.pause"), save: () => "session.save", stop: () => "session.stop" };
for (const [id, kind] of Object.entries(asks)) $(id).addEventListener("click", () => say(kind()));
video.addEventListener("waiting", () => player.follow());
video.addEventListener("error", () => notice(`The video cannot go on: ${video.error.message}`));
setInterval(() => {
  $("m-buffer").textContent = player.seen ? seconds(player.ahead) : "\u2013";
  $("g-buffer").value = player.ahead;
}, 250);
show();
connect();
