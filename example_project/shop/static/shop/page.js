// Shows what /activity tells: a card for each commit, in it the handlers and what they wrote in turn.
"use strict";

// Cards on the page; commits and runs that are known.
const [KEPT, REMEMBERED] = [25, 1000];
const feed = document.getElementById("feed");
const state = document.getElementById("state");
const commits = new Map(); // by the number of the transaction
const runs = new Map(); // by the task's id

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

// A commit is known by two: whoever made it tells its statements, handlers tell that it was read.
// Either may come first.
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

  // Shown by whoever claims it; nobody does where it was written from outside.
  place(parent) {
    if (this.card.isConnected) return;
    const earlier = (card) => Number(card.dataset.at) < Number(this.card.dataset.at);
    if (parent) parent.caused.append(this.card);
    else feed.insertBefore(this.card, [...feed.children].find(earlier) ?? null);
    while (feed.children.length > KEPT) feed.lastChild.remove();
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
      setTimeout(() => this.asked(), 3000);
    }
    const shown = make("pre", "sql");
    shown.tabIndex = 0;
    shown.setAttribute("aria-label", "The SQL that ran");
    event.statements.forEach((statement, place) => {
      const [verb, ...rest] = statement.split(" ");
      shown.append(place ? "\n" : "", make("b", "", verb), ` ${rest.join(" ")}`);
    });
    this.head.after(shown);
    // What a handler writes is of interest where other handlers are told of it.
    if (kind !== "handler" || this.runs.length) this.place(this.parent);
  }

  asked() {
    if (!this.runs.length) this.list.after(make("p", "wants", "No handler asked for this change."));
  }

  add(run) {
    this.runs.push(run);
    this.card.querySelector(".wants")?.remove();
    this.list.append(run.row);
    if (this.claimed) this.place(this.parent);
    else setTimeout(() => this.place(this.parent), 400);
    this.draw();
  }

  // All bars of a commit have one scale.
  draw() {
    const longest = Math.max(...this.runs.map((run) => run.ended ?? run.started + 1));
    const power = 10 ** Math.floor(Math.log10(longest));
    const scale = [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= longest) * power;
    for (const run of this.runs) run.draw(scale);
    this.axis.replaceChildren(make("span", "", "commit"), make("span", "", `+${scale} ms`));
  }
}

// A handler that was told of changes of a commit; times are milliseconds after the commit.
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
    const said = changes.map(describe).join("; ");
    const what = make("span", "what", said);
    what.title = said;
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
  // The old values are told where the replica identity keeps them.
  const changed = change.values
    .filter(([, , now]) => now !== null)
    .map(([name, before, now]) => (before === null ? `${name} ${now}` : `${name} ${before} → ${now}`));
  const said = `${change.operation} ${change.table} ${change.key ? `#${change.key}` : ""}`;
  return changed.length ? `${said}: ${changed.join(", ")}` : said;
}

function commitOf(xid, at) {
  if (!commits.has(xid)) remember(commits, xid, new Commit(xid, at));
  return commits.get(xid);
}

// A page may stay open for days.
function remember(map, key, value) {
  map.set(key, value);
  if (map.size > REMEMBERED) map.delete(map.keys().next().value);
}

const told = {
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
      // A batch may be of several commits: what it writes is shown in the first.
      if (!runs.has(event.task)) remember(runs, event.task, run);
      else runs.get(event.task).others = [...(runs.get(event.task).others ?? []), run];
      commit.add(run);
    }
  },
  end(event) {
    const run = runs.get(event.task);
    for (const one of run ? [run, ...(run.others ?? [])] : []) one.end(event);
  },
};

let last = "";
function watch() {
  const source = new EventSource(`${feed.dataset.events}?after=${last}`);
  const say = (text, kind) => {
    state.textContent = text;
    state.className = kind;
  };
  source.onopen = () => say("Live", "live");
  source.onmessage = (message) => {
    last = message.lastEventId;
    const event = JSON.parse(message.data);
    told[event.kind](event);
    refresh();
  };
  source.addEventListener("trouble", (message) => say(message.data, "trouble"));
  source.onerror = () => {
    if (!state.classList.contains("trouble")) say("Reconnecting", "trouble");
    // The browser comes back by itself, but not from an answer that is none of ours.
    if (source.readyState === EventSource.CLOSED) setTimeout(watch, 2000);
  };
}

// The left side is what the server says, without losing the place of whoever uses the keyboard.
let asked;
function refresh() {
  clearTimeout(asked);
  asked = setTimeout(async () => {
    const answer = await fetch("/").catch(() => null);
    if (answer?.ok) show(await answer.text());
  }, 150);
}

function show(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html");
  for (const part of document.querySelectorAll("[data-fresh]")) {
    const now = fresh.getElementById(part.id);
    localTimes(now);
    const focused = part.contains(document.activeElement) ? document.activeElement : null;
    const order = focused?.closest(".order")?.getAttribute("aria-label");
    if (now.textContent === part.textContent) continue; // a token is another one each time
    const place = part.scrollTop;
    part.replaceChildren(...now.childNodes);
    part.scrollTop = place;
    if (!focused) continue;
    const same = document.getElementById(focused.id);
    (same ?? part.querySelector(`[aria-label="${order}"] button`) ?? feed).focus();
  }
}

document.addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const answer = await fetch(form.action, { method: "POST", body: new FormData(form) }).catch(() => null);
  if (answer?.ok) show(await answer.text());
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
