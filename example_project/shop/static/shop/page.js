// Show the events of /activity: a card for each commit, with its handlers and the commits they made.
"use strict";

// The most cards on the page, and the most commits and runs in memory.
const MAX_CARDS = 25;
const MAX_REMEMBERED = 1000;
const feed = document.getElementById("feed");
const state = document.getElementById("state");
const commits = new Map(); // by transaction id
const runs = new Map(); // by task id

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

function inMilliseconds(number) {
  if (number >= 10000) return `${(number / 1000).toFixed(1)} s`;
  return `${number.toFixed(number < 100 ? 1 : 0)} ms`;
}

function clock(at) {
  return new Date(at).toLocaleTimeString([], { hour12: false });
}

function localTimes(part) {
  for (const time of part.querySelectorAll("time")) time.textContent = clock(time.dateTime);
}

// A commit is reported twice, in any order: by the code that made it, with its statements, and by
// the handlers that received its changes.
class Commit {
  constructor(xid, at) {
    this.runs = [];
    this.card = make("article", "commit fresh");
    this.card.dataset.at = at;
    this.head = make("header");
    this.name = make("h2", "", "psql, or another program");
    this.head.append(this.name, make("small", "", `transaction ${xid}`), make("small", "", clock(at)));
    this.list = make("ul", "runs");
    this.axis = make("div", "axis");
    this.caused = make("div", "caused");
    this.card.append(this.head, this.list, this.axis, this.caused);
  }

  // Add the card to the page. A commit from outside the shop has no event of its own.
  place(parent) {
    if (this.card.isConnected) return;
    const earlier = (card) => Number(card.dataset.at) < Number(this.card.dataset.at);
    if (parent) parent.caused.append(this.card);
    else feed.insertBefore(this.card, [...feed.children].find(earlier) ?? null);
    while (feed.children.length > MAX_CARDS) feed.lastChild.remove();
  }

  claim(event) {
    const kind = event.origin.split(" ")[0].toLowerCase();
    this.card.classList.add(kind);
    this.claimed = true;
    if (kind === "handler") {
      const name = make("h3", "", "then ");
      name.append(make("code", "", event.handler), " wrote");
      this.name.replaceWith(name);
      this.parent = runs.get(event.task)?.commit;
    } else {
      this.name.textContent = event.origin;
      setTimeout(() => this.noteUnhandled(), 3000);
    }
    const sql = make("pre", "sql");
    sql.tabIndex = 0;
    sql.setAttribute("aria-label", "The SQL that ran");
    event.statements.forEach((statement, position) => {
      const [verb, ...rest] = statement.split(" ");
      sql.append(position ? "\n" : "", make("b", "", verb), ` ${rest.join(" ")}`);
    });
    this.head.after(sql);
    // Show a handler's own commit only if it reached other handlers.
    if (kind !== "handler" || this.runs.length) this.place(this.parent);
  }

  noteUnhandled() {
    if (!this.runs.length) this.list.after(make("p", "wants", "No handler subscribes to this change."));
  }

  add(run) {
    this.runs.push(run);
    this.card.querySelector(".wants")?.remove();
    this.list.append(run.row);
    if (this.claimed) this.place(this.parent);
    else setTimeout(() => this.place(this.parent), 400);
    this.draw();
  }

  // All bars of a commit have the same scale.
  draw() {
    const longest = Math.max(...this.runs.map((run) => run.ended ?? run.started + 1));
    const power = 10 ** Math.floor(Math.log10(longest));
    const scale = [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= longest) * power;
    for (const run of this.runs) run.draw(scale);
    this.axis.replaceChildren(make("span", "", "commit"), make("span", "", `+${scale} ms`));
  }
}

// A handler that received changes of a commit; times are milliseconds after the commit.
class Run {
  constructor(event, changes, commit) {
    this.commit = commit;
    this.committed = changes[0].committed;
    this.started = Math.max(event.at - this.committed, 0.1);
    this.row = make("li", "run runs-now");
    this.wait = make("i", "wait");
    this.ran = make("i", "ran");
    const track = make("span", "track");
    track.append(this.wait, this.ran);
    const description = changes.map(describe).join("; ");
    const what = make("span", "what", description);
    what.title = description;
    this.ms = make("span", "ms", inMilliseconds(this.started));
    this.ms.title = "after the commit";
    this.row.append(make("span", "name", event.handler), what, track, this.ms);
  }

  end(event) {
    this.ended = Math.max(event.at - this.committed, this.started);
    this.row.classList.remove("runs-now");
    this.ms.title = `after the commit; ran ${inMilliseconds(this.ended - this.started)}`;
    if (event.state !== "SUCCESS") {
      this.row.classList.add("failed");
      this.ms.textContent = String(event.state).toLowerCase();
    }
    this.commit.draw();
  }

  draw(scale) {
    const part = (number) => `${(100 * number) / scale}%`;
    this.wait.style.width = part(this.started);
    this.ran.style.left = part(this.started);
    this.ran.style.width = part((this.ended ?? this.started) - this.started);
  }
}

function describe(change) {
  // Old values are known only if the replica identity keeps them.
  const changed = change.values
    .filter(([, , now]) => now !== null)
    .map(([name, before, now]) => (before === null ? `${name} ${now}` : `${name} ${before} → ${now}`));
  const row = `${change.operation} ${change.table} ${change.key ? `#${change.key}` : ""}`;
  return changed.length ? `${row}: ${changed.join(", ")}` : row;
}

function commitOf(xid, at) {
  if (!commits.has(xid)) remember(commits, xid, new Commit(xid, at));
  return commits.get(xid);
}

// A page may stay open for days.
function remember(map, key, value) {
  map.set(key, value);
  if (map.size > MAX_REMEMBERED) map.delete(map.keys().next().value);
}

const receive = {
  commit(event) {
    commitOf(event.xid, event.at).claim(event);
  },
  start(event) {
    const byTransaction = new Map();
    for (const change of event.changes) {
      const changes = byTransaction.get(change.xid) ?? [];
      byTransaction.set(change.xid, [...changes, change]);
    }
    for (const [xid, changes] of byTransaction) {
      const commit = commitOf(xid, changes[0].committed);
      const run = new Run(event, changes, commit);
      // A batch may have changes of several commits; its own commits are shown in the first.
      if (!runs.has(event.task)) remember(runs, event.task, run);
      else runs.get(event.task).others = [...(runs.get(event.task).others ?? []), run];
      commit.add(run);
    }
  },
  end(event) {
    const run = runs.get(event.task);
    for (const part of run ? [run, ...(run.others ?? [])] : []) part.end(event);
  },
};

let last = "";
function watch() {
  const source = new EventSource(`${feed.dataset.events}?after=${last}`);
  const setState = (text, kind) => {
    state.textContent = text;
    state.className = kind;
  };
  source.onopen = () => setState("Live", "live");
  source.onmessage = (message) => {
    last = message.lastEventId;
    const event = JSON.parse(message.data);
    receive[event.kind](event);
    refresh();
  };
  source.addEventListener("trouble", (message) => setState(message.data, "trouble"));
  source.onerror = () => {
    if (!state.classList.contains("trouble")) setState("Reconnecting", "trouble");
    // The browser reconnects by itself, except after a response that is not an event stream.
    if (source.readyState === EventSource.CLOSED) setTimeout(watch, 2000);
  };
}

// Reload the parts of the page that the server renders, and keep the keyboard's focus.
let refreshTimer = null;
function refresh() {
  refreshTimer ??= setTimeout(async () => {
    refreshTimer = null;
    const response = await fetch("/").catch(() => null);
    if (response?.ok) show(await response.text());
  }, 150);
}

function show(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html");
  for (const part of document.querySelectorAll("[data-fresh]")) {
    const newPart = fresh.getElementById(part.id);
    localTimes(newPart);
    if (newPart.dataset.waiting > 0) refresh();
    const focused = part.contains(document.activeElement) ? document.activeElement : null;
    const order = focused?.closest(".order")?.getAttribute("aria-label");
    if (newPart.textContent === part.textContent) continue; // CSRF tokens differ each time
    const scrollTop = part.scrollTop;
    part.replaceChildren(...newPart.childNodes);
    part.scrollTop = scrollTop;
    if (!focused) continue;
    const same = document.getElementById(focused.id);
    (same ?? part.querySelector(`[aria-label="${order}"] button`) ?? feed).focus();
  }
}

document.addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const response = await fetch(form.action, { method: "POST", body: new FormData(form) }).catch(() => null);
  if (response?.ok) show(await response.text());
  else refresh();
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
});

localTimes(document);
if (feed.dataset.events) watch();
