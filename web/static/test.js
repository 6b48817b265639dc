// Keeps the page of a test up to date until it is over. All words come from the server.
"use strict";

const place = document.getElementById("test");
const EVERY = 500;
const LONGEST_BACKOFF = 10_000;
let failures = 0;

const poll = async () => {
  try {
    const response = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(10_000) });
    if (response.ok) {
      const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
      const now = fresh.getElementById("test");
      if (now.innerHTML !== place.innerHTML) {
        place.innerHTML = now.innerHTML;
        place.dataset.over = now.dataset.over;
        document.title = fresh.title;
      }
      failures = 0;
    }
  } catch {
    failures += 1;
  }
  if (place.dataset.over !== "true") setTimeout(poll, Math.min(LONGEST_BACKOFF, EVERY * 2 ** failures));
};
if (place.dataset.over !== "true") setTimeout(poll, EVERY);
