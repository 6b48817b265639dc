// What every page does beyond plain HTML: one click is one submission, times are local, and lists may come from a file.
"use strict";

// The server tells a second click from a first one by the form's token; this only keeps it from being tempting.
document.addEventListener("submit", (event) => {
  const form = event.target;
  // What opens another page leaves this one as it is.
  if (!form.matches("form[data-once]") || event.submitter?.formTarget) return;
  if (form.dataset.sent) {
    event.preventDefault();
    return;
  }
  form.dataset.sent = "yes";
  // Not before the form is on its way: a disabled button would not be sent.
  setTimeout(() => {
    for (const button of form.querySelectorAll("button:not([hidden])")) button.disabled = true;
  });
});

// Coming back through the history shows the page as it was left.
window.addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("form[data-sent]")) {
    delete form.dataset.sent;
    for (const button of form.querySelectorAll("button:not([hidden])")) button.disabled = false;
  }
});

// Enter in the address of a test sends the test; in the other fields it sends nothing.
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
  // Beyond this, counting at every pause of typing would be felt.
  const countable = 4_000_000;
  let pause = 0;
  let asking = null;

  // A guess while the list is written.
  const guess = () => {
    const text = emails.value;
    const found = text.length > countable ? null : text.match(/[^\s,;<>"]+@[^\s,;<>"]+/g);
    count.hidden = !found;
    if (found) count.textContent = `about ${found.length === 1 ? "1 address" : `${found.length.toLocaleString("en")} addresses`}`;
  };
  // What the list is read as, by the server, once typing pauses.
  const ask = async () => {
    const list = emails.value;
    if (list.length > countable || list.trim() === "") return;
    asking = new AbortController();
    try {
      const body = new URLSearchParams({ emails: list });
      const answer = await fetch("invites/count", { method: "POST", body, signal: asking.signal });
      if (!answer.ok) return;
      const { text } = await answer.json();
      if (emails.value !== list) return;
      count.hidden = false;
      count.textContent = text;
    } catch {
      // Given up, or the server is away: the guess stays.
    }
  };
  const tell = () => {
    clearTimeout(pause);
    asking?.abort();
    pause = setTimeout(() => {
      guess();
      pause = setTimeout(ask, 450);
    }, 150);
  };
  emails.addEventListener("input", tell);
  tell();
  // A form that was refused: begin at the top, where the list does, with the message in view.
  if (emails.getAttribute("aria-invalid")) emails.setSelectionRange(0, 0);

  const label = document.getElementById("from-file");
  const input = label.querySelector("input");
  label.hidden = false;
  // Spreadsheets write UTF-16 with a mark, UTF-8, or the code page of Windows, in which every byte is a letter.
  const decode = (bytes) => {
    const marked = bytes[0] === 0xff && bytes[1] === 0xfe ? "utf-16le" : bytes[0] === 0xfe && bytes[1] === 0xff ? "utf-16be" : null;
    if (marked) return new TextDecoder(marked).decode(bytes);
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
    tell();
    emails.focus();
  };
  input.addEventListener("change", async () => {
    await add(input.files[0]);
    // The same file may be chosen again.
    input.value = "";
  });
  emails.addEventListener("drop", (event) => {
    const file = event.dataTransfer.files[0];
    if (!file) return;
    event.preventDefault();
    add(file);
  });
}
