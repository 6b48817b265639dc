// Keeps the page of a test up to date until it is over. All texts come from the server.
"use strict";

const place = document.getElementById("test");
const EVERY = 500;
const LONGEST_BACKOFF = 10_000;
// Why polling stops, by response status.
const FINAL = {
  401: "Your login is no longer accepted, so this page has stopped updating. Reload it to log in.",
  403: "Mailrun no longer answers this page, so it has stopped updating. Reload it to see why.",
  404: "This test no longer exists: tests are deleted after a day.",
};
let failures = 0;

const poll = async () => {
  try {
    const response = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(10_000) });
    const final = FINAL[response.status];
    if (final) {
      const connection = document.getElementById("connection");
      connection.hidden = false;
      connection.textContent = final;
      return;
    }
    if (response.ok) {
      const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
      const now = fresh.getElementById("test");
      if (now.innerHTML !== place.innerHTML) {
        place.innerHTML = now.innerHTML;
        place.dataset.over = now.dataset.over;
        document.title = fresh.title;
      }
      failures = 0;
    } else {
      failures += 1;
    }
  } catch {
    failures += 1;
  }
  if (place.dataset.over !== "true") setTimeout(poll, Math.min(LONGEST_BACKOFF, EVERY * 2 ** failures));
};
if (place.dataset.over !== "true") setTimeout(poll, EVERY);
