// Behaviour that every page adds to plain HTML: submit once, show local times, read a list from a file.
"use strict";

// The server detects a repeated submission by the form's token; this only prevents the second click.
document.addEventListener("submit", (event) => {
  const form = event.target;
  // A button that opens another page leaves this page usable.
  if (!form.matches("form[data-once]") || event.submitter?.formTarget) return;
  if (form.dataset.sent) {
    event.preventDefault();
    return;
  }
  form.dataset.sent = "yes";
  // Only after the form has been submitted: a disabled button is not part of the submission.
  setTimeout(() => {
    for (const button of form.querySelectorAll("button:not([hidden])")) button.disabled = true;
  });
});

// Going back in the history restores the page with its buttons disabled.
window.addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("form[data-sent]")) {
    delete form.dataset.sent;
    for (const button of form.querySelectorAll("button:not([hidden])")) button.disabled = false;
  }
});

// Enter in the test address sends the test; in the other fields it submits nothing.
document.getElementById("test_email")?.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  event.preventDefault();
  document.getElementById("send-test").click();
});

const format = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
for (const time of document.querySelectorAll("time[datetime]")) {
  time.textContent = format.format(new Date(time.dateTime));
}

const emails = document.getElementById("emails");
if (emails) {
  const count = document.getElementById("count");
  // Counting a longer list at each pause in typing would be noticeable.
  const countable = 4_000_000;
  let timer = 0;
  let request = null;

  // An estimate, shown while the list is being typed.
  const estimate = () => {
    const text = emails.value;
    const found = text.length > countable ? null : text.match(/[^\s,;<>"]+@[^\s,;<>"]+/g);
    count.hidden = !found;
    if (found) count.textContent = `about ${found.length === 1 ? "1 address" : `${found.length.toLocaleString("en")} addresses`}`;
  };
  // The exact count, by the server's parser, once typing pauses.
  const fetchCount = async () => {
    const list = emails.value;
    if (list.length > countable || list.trim() === "") return;
    request = new AbortController();
    try {
      const body = new URLSearchParams({ emails: list });
      const response = await fetch("invites/count", { method: "POST", body, signal: request.signal });
      if (!response.ok) return;
      const { text } = await response.json();
      if (emails.value !== list) return;
      count.hidden = false;
      count.textContent = text;
    } catch {
      // Aborted, or the server cannot be reached: the estimate stays.
    }
  };
  const updateCount = () => {
    clearTimeout(timer);
    request?.abort();
    timer = setTimeout(() => {
      estimate();
      timer = setTimeout(fetchCount, 450);
    }, 150);
  };
  emails.addEventListener("input", updateCount);
  updateCount();
  // After a refused submission, put the cursor at the start of the list, so that the error stays in view.
  if (emails.getAttribute("aria-invalid")) emails.setSelectionRange(0, 0);

  const label = document.getElementById("from-file");
  const input = label.querySelector("input");
  label.hidden = false;
  // Spreadsheets write UTF-16 with a byte order mark, UTF-8, or Windows-1252, in which every byte is a character.
  const decode = (bytes) => {
    const encoding = bytes[0] === 0xff && bytes[1] === 0xfe ? "utf-16le" : bytes[0] === 0xfe && bytes[1] === 0xff ? "utf-16be" : null;
    if (encoding) return new TextDecoder(encoding).decode(bytes);
    try {
      return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    } catch {
      return new TextDecoder("windows-1252").decode(bytes);
    }
  };
  const add = async (file) => {
    if (!file) return;
    const text = decode(new Uint8Array(await file.arrayBuffer()));
    emails.value = emails.value.trim() === "" ? text : `${emails.value.trimEnd()}\n${text}`;
    updateCount();
    emails.focus();
  };
  input.addEventListener("change", async () => {
    await add(input.files[0]);
    // Allows choosing the same file again.
    input.value = "";
  });
  emails.addEventListener("drop", (event) => {
    const file = event.dataTransfer.files[0];
    if (!file) return;
    event.preventDefault();
    add(file);
  });
}
