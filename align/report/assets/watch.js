// Keeps a live page up to date: what the server shows otherwise than before is replaced, and nothing else.
"use strict";

const SECONDS_BETWEEN = 2;
const WHOLE = "h1, p, li, tbody, svg, td, dd, dt";
const watched = { served: document.documentElement.cloneNode(true), tag: null };

function update(shown, before, now) {
  if (before.isEqualNode(now)) return false;
  const alike = before.children.length === now.children.length && shown.children.length === now.children.length &&
    [...before.children].every((child, index) => child.tagName === now.children[index].tagName && child.id === now.children[index].id);
  if (!alike || !now.children.length || now.matches(WHOLE)) {
    shown.replaceWith(document.importNode(now, true));
    return true;
  }
  [...shown.children].map((child, index) => update(child, before.children[index], now.children[index]));
  return true;
}

function showAll(page) {
  document.title = page.querySelector("title").textContent;
  const parts = ["header", "nav ul", "main", "#axes-data"].filter((part) => document.querySelector(part));
  const changes = parts.map((part) =>
    update(document.querySelector(part), watched.served.querySelector(part), page.querySelector(part)));
  watched.served = page;
  if (changes.some(Boolean)) setUp();
}

// Says what keeps the page from being up to date; nothing where it is.
function showTrouble(text) {
  const line = document.querySelector("#trouble");
  line.hidden = !text;
  line.textContent = text;
}

async function look() {
  try {
    const answer = await fetch("/", { headers: watched.tag ? { "If-None-Match": watched.tag } : {} });
    showTrouble(answer.status === 200 || answer.status === 304 ? "" : await answer.clone().text());
    if (answer.status === 200) {
      watched.tag = answer.headers.get("ETag");
      showAll(new DOMParser().parseFromString(await answer.text(), "text/html").documentElement);
    }
  } catch {
    showTrouble("There is no connection to align watch.");
    document.title = "not connected · align watch";
  }
  setTimeout(look, 1000 * SECONDS_BETWEEN);
}

setTimeout(look, 1000 * SECONDS_BETWEEN);
