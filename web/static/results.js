// Keeps a run's page up to date: asks for its progress, and draws what has changed. All words come from the server.
"use strict";

const run = document.getElementById("run");
const find = (id) => document.getElementById(id);
const address = `/runs/${run.dataset.run}`;
// Milliseconds between two polls.
const LIVE = 300;
const IDLE = 2000;
// After so long without a change, a run is not worth asking after three times a second.
const QUIET_AFTER = 15_000;
const LONGEST_BACKOFF = 15_000;
// The table of failures is fetched at most this often while it grows.
const TROUBLES_EVERY = 2000;

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

// An element's text, touched only if it is another: a selection stays, and a screen reader stays silent.
const say = (element, text) => {
  if (element.textContent !== text) element.textContent = text;
};

// The same, with each number kept on one line with its word.
const sayCounts = (element, text) => {
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
  say(find("state"), now.state);
  find("state").className = `chip ${state}`;
  sayCounts(find("progress-text"), now.text);
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
    say(line.querySelector("dd"), count.toLocaleString("en"));
  }

  say(find("note").querySelector("span"), now.note);
  find("skipped-note").hidden = now.skipped_note === null;
  say(find("skipped-note"), now.skipped_note ?? "");
  say(find("elapsed-of"), now.elapsed_of);
  say(find("elapsed"), now.elapsed);
  find("speed-fact").hidden = now.speed === null;
  say(find("speed-of"), now.over ? "On average" : "Rate");
  say(find("speed"), now.speed ?? "");
  find("left-fact").hidden = now.left === null;
  say(find("left"), now.left ?? "");
};

// A screen reader hears of every new phase and of each quarter, not of every poll.
let announced = `${run.dataset.phase} ${document.title}`;
const announce = (now) => {
  const moment = `${now.phase} ${now.asked} ${Math.floor(now.percent / 25)}`;
  if (announced === moment) return;
  announced = moment;
  say(find("announcer"), `${now.state}: ${now.text}`);
};

// Parts of the page that are more than numbers are fetched as HTML when the numbers say that they have changed. Tells
// whether the part is up to date: it may still be too soon after the last time.
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
const troubles = part("troubles", ["after"], TROUBLES_EVERY);

let timer = 0;
let polling = false;
let failures = 0;
// An answer after which asking again is of no use.
let ended = false;
let changed = Date.now();
let last = "";

// Why asking ends, by the status of the answer; all others may be another next time.
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
    const complete = await troubles(`${now.failed} ${now.unknown}`);
    failures = 0;
    find("connection").hidden = true;
    if (!now.over || now.asked) {
      wait = now.phase === "paused" || Date.now() - changed > QUIET_AFTER ? IDLE : LIVE;
    } else if (!complete) {
      wait = IDLE;
    }
  } catch (error) {
    failures += 1;
    find("connection").hidden = false;
    ended = error.status in FINAL;
    say(find("connection"), FINAL[error.status] ?? "Connection lost, trying again…");
    if (!ended) wait = Math.min(LONGEST_BACKOFF, 500 * 2 ** Math.min(failures, 6));
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
