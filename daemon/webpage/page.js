"use strict";
// Fetches the page anew every two seconds and puts its live part in place of the
// old one. Without scripts the page reloads itself.
const interval = 2000;
const patience = 10000;
// Not location.href, which may hold a password that fetch would refuse.
const here = location.origin + location.pathname;
const news = document.getElementById("news");
let last = news.textContent;

async function refresh() {
  const selection = document.getSelection();
  if (document.hidden || selection && !selection.isCollapsed) {
    return; // nobody looks, or somebody copies
  }
  try {
    const answer = await fetch(here, {cache: "no-store", signal: AbortSignal.timeout(patience)});
    if (!answer.ok) {
      throw new Error(answer.status + " " + answer.statusText);
    }
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.getElementById("live").replaceWith(document.adoptNode(page.getElementById("live")));
    last = page.getElementById("news").textContent;
    news.textContent = last;
    document.body.classList.remove("stale");
  } catch (err) {
    news.textContent = "nix-dispatchd does not answer; what is shown is " + last;
    document.body.classList.add("stale");
  }
}

async function live() {
  for (;;) {
    await new Promise((next) => setTimeout(next, interval));
    await refresh();
  }
}

live();
