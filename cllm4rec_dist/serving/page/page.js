// The page for POST /recommend, GET /items and GET /run. Titles are untrusted, so they only become text nodes.
// URLs are relative, so that a proxy may serve the page below any path.

const MOST_EXPLAINED = 100; // limit of the service on basket items
const SHOWN_REASONS = 3;
const SMALLEST_REASON = 0.005; // smaller ones would be shown as 0.00
const TOP = 10;
const SEARCH_PAUSE = 120; // milliseconds after the last key
const MOST_RETRIES = 3;
const NEW_NOTE = "new product, known by this text alone";

const byId = (id) => document.getElementById(id);
const search = byId("search");
const found = byId("found");
const list = byId("list");

const state = {
  basket: [], // items: {item, title, category, isNew}, oldest first
  soldOut: [],
  categories: [], // names of excluded categories
  options: [], // search results
  active: -1, // index into options
  isSearching: false, // options are those of an earlier text
  checkpoint: null,
};

// ---- Elements

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const nameOf = (item) => item.title || item.item;
const announce = (text) => { byId("status").textContent = text; };
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// ---- The service

class Refused extends Error {
  constructor(text, retryAfter) {
    super(text);
    this.retryAfter = retryAfter;
  }
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The service cannot be reached.", null);
  }
  if (response.ok) return response.json();
  const problem = await response.json().catch(() => ({}));
  const retryAfter = response.status === 503 ? Number(response.headers.get("Retry-After")) || 1 : null;
  throw new Refused(problem.detail || `The service answered with status ${response.status}.`, retryAfter);
}

const post = (path, body, signal) => request(path, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
});

// ---- Search: a combobox with a list box (WAI-ARIA authoring practices)

let searching = null;
let searchTimer = 0;

function closeFound() {
  clearTimeout(searchTimer);
  searching?.abort();
  state.options = [];
  state.active = -1;
  setSearching(false);
  found.hidden = true;
  found.replaceChildren();
  search.setAttribute("aria-expanded", "false");
  search.removeAttribute("aria-activedescendant");
}

// Until its products come the list has those of an earlier text, which no key may choose.
function setSearching(isSearching) {
  state.isSearching = isSearching;
  search.setAttribute("aria-busy", String(isSearching));
}

function showFound(items) {
  state.options = items;
  setSearching(false);
  state.active = -1;
  search.removeAttribute("aria-activedescendant");
  found.replaceChildren(...items.map((item, index) => element(
    "li",
    {
      id: `option-${index}`, role: "option", "aria-selected": "false",
      onpointerdown: (event) => event.preventDefault(), // keeps the focus in the input
      onclick: () => choose(item),
    },
    element("span", { class: "title" }, nameOf(item)),
    element("span", { class: "sub" }, item.isNew ? NEW_NOTE : [item.category, item.item].filter(Boolean).join(" · ")),
  )));
  found.hidden = false;
  search.setAttribute("aria-expanded", "true");
  const isNew = items[0].isNew;
  const text = isNew ? "No product has these words in its title." : `${plural(items.length, "product")} found`;
  byId("search-note").textContent = isNew ? text : "";
  announce(isNew ? `${text} It can be added as a new product.` : text);
}

// What nobody has heard of is offered as a product that is known by its text alone.
const newProduct = (text) => ({ item: `new: ${text}`, title: text, category: null, isNew: true });

function activate(index) {
  const options = [...found.children];
  state.active = (index + options.length) % options.length;
  options.forEach((option, at) => option.setAttribute("aria-selected", String(at === state.active)));
  search.setAttribute("aria-activedescendant", options[state.active].id);
  options[state.active].scrollIntoView({ block: "nearest" });
}

function choose(item) {
  search.value = "";
  closeFound();
  addToBasket(item);
}

async function find(text) {
  searching?.abort();
  searching = new AbortController();
  const { signal } = searching;
  try {
    const answer = await request(`items?${new URLSearchParams({ query: text, limit: "10" })}`, { signal });
    if (!signal.aborted) showFound(answer.items.length ? answer.items : [newProduct(text)]);
  } catch (error) {
    if (signal.aborted) return;
    closeFound();
    byId("search-note").textContent = error.message;
  }
}

search.addEventListener("input", () => {
  clearTimeout(searchTimer);
  searching?.abort();
  byId("search-note").textContent = "";
  const text = search.value.trim();
  if (!text) return closeFound();
  setSearching(true);
  searchTimer = setTimeout(() => find(text), SEARCH_PAUSE);
});
search.addEventListener("blur", closeFound);
search.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const open = !found.hidden;
  if (event.key === "Escape") {
    if (!open) search.value = "";
    closeFound();
  } else if (state.isSearching && ["Enter", "ArrowDown", "ArrowUp"].includes(event.key)) {
    // pressed again when the products have come
  } else if (event.key === "Enter" && open) {
    choose(state.options[Math.max(state.active, 0)]);
  } else if (open && event.key === "ArrowDown") {
    activate(state.active + 1);
  } else if (open && event.key === "ArrowUp") {
    activate(state.active < 0 ? state.options.length - 1 : state.active - 1);
  } else {
    return;
  }
  event.preventDefault();
});

// ---- Basket and what is left out

function addToBasket(item) {
  if (state.basket.some((other) => other.item === item.item)) {
    announce(`${nameOf(item)} is in the basket already`);
    return;
  }
  state.basket.push(item);
  announce(`${nameOf(item)} is in the basket`);
  changed();
}

function leaveOut(item) {
  state.soldOut.push(item);
  announce(`${nameOf(item)} is left out`);
  changed();
}

function leaveOutCategory(name) {
  state.categories.push(name);
  announce(`Category ${name} is left out`);
  changed();
}

function take(entries, index, text) {
  entries.splice(index, 1);
  announce(text);
  changed();
}

function line(entries, index, text, note, label, said) {
  return element(
    "li", {},
    element("span", {}, element("span", { class: "title" }, text), note ? element("span", { class: "sub" }, note) : null),
    element("button", {
      type: "button", class: "cross", "aria-label": label,
      onclick: (event) => {
        const inside = event.currentTarget.closest("ul");
        take(entries, index, said);
        const buttons = inside.querySelectorAll("button"); // the focus stays where the removed line was
        (buttons[Math.min(index, buttons.length - 1)] ?? search).focus();
      },
    }, "×"),
  );
}

function showChoices() {
  byId("basket").replaceChildren(...state.basket.map((item, index) => line(
    state.basket, index, nameOf(item), item.isNew ? NEW_NOTE : item.category, `Remove ${nameOf(item)} from the basket`,
    `${nameOf(item)} is no longer in the basket`,
  )));
  byId("clear").hidden = state.basket.length < 2;
  byId("left-out").replaceChildren(
    ...state.soldOut.map((item, index) => line(
      state.soldOut, index, nameOf(item), "sold out", `List ${nameOf(item)} again`, `${nameOf(item)} may be listed again`,
    )),
    ...state.categories.map((name, index) => line(
      state.categories, index, name, "category", `List the category ${name} again`, `${name} may be listed again`,
    )),
  );
  byId("left-out-part").hidden = state.soldOut.length + state.categories.length === 0;
}

byId("clear").addEventListener("click", () => {
  state.basket.length = 0;
  announce("The basket is empty");
  changed();
  search.focus();
});

function changed() {
  showChoices();
  refresh();
}

// ---- Recommendations

let pending = null;
let retryTimer = 0;

async function refresh(retries = MOST_RETRIES) {
  clearTimeout(retryTimer);
  pending?.abort();
  pending = new AbortController();
  const { signal } = pending;
  list.setAttribute("aria-busy", "true");
  try {
    const answer = await post("recommend", {
      history: state.basket.map((item) => item.item),
      new_items: state.basket.filter((item) => item.isNew).map(({ item, title }) => ({ item, title })),
      exclude: state.soldOut.map((item) => item.item),
      exclude_categories: state.categories,
      top: TOP,
      explain: state.basket.length > 0 && state.basket.length <= MOST_EXPLAINED,
    }, signal);
    if (signal.aborted) return;
    byId("problem").hidden = true;
    showAnswer(answer);
    if (answer.checkpoint !== state.checkpoint) showRun();
  } catch (error) {
    if (signal.aborted) return;
    if (error.retryAfter !== null && retries > 0) {
      retryTimer = setTimeout(() => refresh(retries - 1), error.retryAfter * 1000);
      return;
    }
    byId("problem-text").textContent = error.message;
    byId("problem").hidden = false;
  } finally {
    if (!signal.aborted) list.setAttribute("aria-busy", "false");
  }
}

function showAnswer(answer) {
  byId("results-title").textContent = answer.fallback ? "Most popular" : "Recommended for this basket";
  const notes = [];
  if (answer.fallback) notes.push(state.basket.length ? "Nothing in the basket is known to the model." : "Put a product into the basket to see what goes with it.");
  else if (answer.items[0]?.because) notes.push("Bars show what each product of the basket adds to a score: the score with it minus the score without it.");
  if (answer.unknown_items.length) notes.push(`${plural(answer.unknown_items.length, "product")} of the basket are unknown to the model.`);
  if (answer.items.length === 0) notes.push("Nothing is left to recommend.");
  byId("results-note").textContent = notes.join(" ");
  const reasons = answer.items.flatMap((item) => item.because ?? []);
  const largest = Math.max(1e-12, ...reasons.map((reason) => Math.abs(reason.contribution)));
  const kept = focusKey();
  list.replaceChildren(...answer.items.map((item, index) => card(item, index + 1, largest, answer.fallback)));
  restoreFocus(kept);
  announce(`${byId("results-title").textContent}: ${plural(answer.items.length, "product")}`);
}

// The list is rebuilt; a focused button keeps its position in the list.
function focusKey() {
  const focused = document.activeElement;
  if (!list.contains(focused)) return null;
  return [...list.querySelectorAll("button.main")].findIndex((button) => button.closest("li") === focused.closest("li"));
}

function restoreFocus(kept) {
  if (kept === null) return;
  const buttons = list.querySelectorAll("button.main");
  (buttons[Math.min(kept, buttons.length - 1)] ?? byId("results")).focus({ preventScroll: true });
}

function card(item, rank, largest, fallback) {
  const name = nameOf(item);
  const plain = { item: item.item, title: item.title, category: item.category };
  return element(
    "li", {},
    element("span", { class: "rank", "aria-hidden": "true" }, String(rank)),
    element("div", {},
      element("h3", {}, name),
      element("p", { class: "meta" },
        item.category ? element("span", { class: "chip" }, item.category) : null,
        item.title ? item.item : null)),
    ...why(item.because, largest, fallback),
    element("div", { class: "actions" },
      element("button", { type: "button", class: "main", "aria-label": `Add ${name} to the basket`, onclick: () => addToBasket(plain) }, "Add to basket"),
      element("button", { type: "button", "aria-label": `${name} is sold out: leave it out`, onclick: () => leaveOut(plain) }, "Sold out"),
      item.category
        ? element("button", { type: "button", "aria-label": `Leave out the category ${item.category}`, onclick: () => leaveOutCategory(item.category) }, "Not this category")
        : null),
  );
}

function why(because, largest, fallback) {
  if (fallback) return [element("p", { class: "why-title" }, "Popular with all customers")];
  if (!because?.length) return [];
  const counted = because.filter((reason) => Math.abs(reason.contribution) >= SMALLEST_REASON);
  if (!counted.length) return [element("p", { class: "why-title" }, "No product of the basket speaks for it or against it")];
  const shown = counted.slice(0, SHOWN_REASONS);
  return [
    element("p", { class: "why-title" }, "Because of"),
    element("ul", { class: "why" },
      ...shown.map((reason) => {
        const part = element("i");
        part.style.setProperty("--share", String(Math.abs(reason.contribution) / largest));
        const sign = reason.contribution < 0 ? "−" : "+";
        return element("li", {},
          element("span", { class: reason.contribution < 0 ? "track down" : "track", "aria-hidden": "true" }, part),
          element("span", { class: "amount" }, `${sign}${Math.abs(reason.contribution).toFixed(2)}`),
          element("span", {}, reason.title || reason.item));
      }),
      counted.length > shown.length
        ? element("li", { class: "more" }, `and ${plural(counted.length - shown.length, "other product")} of the basket`)
        : null),
  ];
}

byId("retry").addEventListener("click", () => refresh());

// ---- The run

async function showRun() {
  let run;
  try {
    run = await request("run");
  } catch (error) {
    byId("run-line").textContent = error.message;
    document.querySelector(".dot").classList.add("off");
    return;
  }
  document.querySelector(".dot").classList.remove("off");
  state.checkpoint = run.checkpoint;
  const number = (value) => value.toLocaleString("en");
  const date = new Date(run.date);
  const day = Number.isNaN(date.getTime()) ? run.date : date.toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" });
  const time = Number.isNaN(date.getTime()) ? run.date : date.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  const metric = run.best_value === null ? null : `${run.best_metric} ${run.best_value.toFixed(3)}`;
  byId("run-line").textContent = [run.corpus, day, metric].filter(Boolean).join(" · ");
  const facts = {
    Data: run.corpus,
    Run: `${run.run} (${run.stage})`,
    Checkpoint: run.checkpoint,
    Written: time,
    Steps: number(run.step),
    Validation: metric ?? (run.best_metric === null ? "never validated" : "another checkpoint was better"),
    Products: number(run.num_items),
    Customers: number(run.num_users),
    Backbone: run.backbone,
    Parameters: `${number(run.num_parameters)}, of which ${number(run.num_trained)} trained`,
    Version: `cllm4rec ${run.version}`,
  };
  byId("run-facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [
    element("dt", {}, name), element("dd", {}, value),
  ]));
}

showChoices();
showRun();
refresh();
