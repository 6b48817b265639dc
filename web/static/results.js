// Keeps a run's page up to date: polls its progress and draws what has changed. All texts come from the server.
"use strict";

const run = document.getElementById("run");
const find = (id) => document.getElementById(id);
const address = `/runs/${run.dataset.run}`;
// Milliseconds between two polls.
const LIVE = 300;
const IDLE = 2000;
// A run that has not changed for this long is polled at the slower interval.
const QUIET_AFTER = 15_000;
const LONGEST_BACKOFF = 15_000;
// While the table of failures grows, it is fetched at most this often.
const FAILURES_EVERY = 2000;

const parameters = (names) => {
  const query = new URLSearchParams();
  for (const name of names) if (run.dataset[name] && run.dataset[name] !== "0") query.set(name, run.dataset[name]);
  return query.size ? `?${query}` : "";
};

const get = async (path) => {
  const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10_000) });
  if (!response.ok) throw Object.assign(new Error(`status ${response.status}`), { status: response.status });
  return response;
};

// Sets an element's text only if it differs: this keeps a selection, and a screen reader repeats nothing.
const setText = (element, text) => {
  if (element.textContent !== text) element.textContent = text;
};

// The same, with each number kept on one line with its word.
const setCounts = (element, text) => {
  if (element.textContent === text) return;
  const parts = text.split(/(?<=,) /).flatMap((part) => {
    const span = document.createElement("span");
    span.textContent = part;
    return [" ", span];
  });
  element.replaceChildren(...parts.slice(1));
};

const draw = (now) => {
  const state = now.state.toLowerCase();
  run.dataset.phase = state;
  run.dataset.over = now.over;
  run.dataset.complete = now.sent === now.total;
  setText(find("state"), now.state);
  find("state").className = `chip ${state}`;
  setCounts(find("progress-text"), now.text);
  document.title = `${now.over ? now.state : `${now.percent}%`} · Mailrun`;

  const bar = find("bar");
  bar.setAttribute("aria-valuenow", now.total - now.pending - now.retrying);
  bar.setAttribute("aria-valuetext", now.text);
  ["sent", "retrying", "failed", "unknown", "cancelled"].forEach((segment, index) => {
    bar.querySelector(`rect.${segment}`).setAttribute("width", `${now.edges[index]}%`);
  });
  for (const line of find("legend").children) {
    const count = now[line.dataset.count];
    line.hidden = count === 0 && line.dataset.count !== "sent";
    setText(line.querySelector("dd"), count.toLocaleString("en"));
  }

  setText(find("note").querySelector("span"), now.note);
  find("skipped-note").hidden = now.skipped_note === null;
  setText(find("skipped-note"), now.skipped_note ?? "");
  setText(find("elapsed-of"), now.elapsed_of);
  setText(find("elapsed"), now.elapsed);
  find("speed-fact").hidden = now.speed === null;
  setText(find("speed-of"), now.over ? "On average" : "Rate");
  setText(find("speed"), now.speed ?? "");
  find("left-fact").hidden = now.left === null;
  setText(find("left"), now.left ?? "");
};

// A screen reader announces each new phase and each quarter, not each poll.
let announced = `${run.dataset.phase} ${document.title}`;
const announce = (now) => {
  const moment = `${now.phase} ${now.asked} ${Math.floor(now.percent / 25)}`;
  if (announced === moment) return;
  announced = moment;
  setText(find("announcer"), `${now.state}: ${now.text}`);
};

// Parts of the page that are more than numbers are fetched as HTML when their key changes. Resolves to whether the part
// is up to date: it may be too soon to fetch it again.
const part = (id, names, every) => {
  const place = find(id);
  let shown = null;
  let fetched = 0;
  return async (key) => {
    if (key === shown) return true;
    if (Date.now() - fetched < every) return false;
    fetched = Date.now();
    const fresh = document.createElement("template");
    fresh.innerHTML = await (await get(`${address}/${id}${parameters(names)}`)).text();
    shown = key;
    if (fresh.innerHTML.trim() === place.innerHTML.trim()) return true;
    const focused = place.contains(document.activeElement) ? document.activeElement.id : null;
    place.replaceChildren(fresh.content);
    if (focused !== null) (find(focused) ?? place.querySelector("button, a"))?.focus();
    return true;
  };
};
const actions = part("actions", ["asked", "confirm"], 0);
const failures = part("troubles", ["after"], FAILURES_EVERY);

let timer = 0;
let polling = false;
let failedPolls = 0;
// Set by a response after which polling is pointless.
let ended = false;
let changed = Date.now();
let last = "";

// Why polling stops, by response status. Any other status is retried.
const FINAL = {
  401: "Your login is no longer accepted, so this page has stopped updating. Reload it to log in. Sending is not affected.",
  403: "Mailrun no longer answers this page, so it has stopped updating. Reload it to see why. Sending is not affected.",
  404: "This run no longer exists.",
};

const poll = async () => {
  if (polling || ended) return;
  polling = true;
  let wait = null;
  try {
    const now = await (await get(`${address}/progress${parameters(["asked"])}`)).json();
    draw(now);
    announce(now);
    const counts = [now.phase, now.pending, now.retrying, now.sent, now.failed, now.unknown].join();
    if (counts !== last) changed = Date.now();
    last = counts;
    await actions(now.over ? `${counts} ${now.asked}` : now.phase);
    const complete = await failures(`${now.failed} ${now.unknown}`);
    failedPolls = 0;
    find("connection").hidden = true;
    if (!now.over || now.asked) {
      wait = now.phase === "paused" || Date.now() - changed > QUIET_AFTER ? IDLE : LIVE;
    } else if (!complete) {
      wait = IDLE;
    }
  } catch (error) {
    failedPolls += 1;
    find("connection").hidden = false;
    ended = error.status in FINAL;
    setText(find("connection"), FINAL[error.status] ?? "Connection lost, retrying…");
    if (!ended) wait = Math.min(LONGEST_BACKOFF, 500 * 2 ** Math.min(failedPolls, 6));
  }
  polling = false;
  if (wait !== null && !document.hidden) timer = setTimeout(poll, wait);
};

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden) poll();
});
window.addEventListener("online", () => {
  clearTimeout(timer);
  poll();
});
window.addEventListener("pageshow", (event) => {
  if (event.persisted) poll();
});
poll();
