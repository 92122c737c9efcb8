// Asks for this page every two seconds and takes over what has changed. Focus, selection and scrolling stay where they
// are, because what has not changed is not touched. Nothing is asked while the page is paused or not to be seen.
(() => {
  "use strict";
  const EVERY_MS = 2000;
  const PATIENCE_MS = 5000;
  const byId = (id) => document.getElementById(id);
  const fresh = byId("fresh"), stale = byId("stale"), announce = byId("announce"), pause = byId("pause");
  let paused = false, timer = 0, last = byId("live").dataset.at, missing = "";

  function take(old, now) {
    if (old.nodeType !== now.nodeType || old.nodeName !== now.nodeName) {
      old.replaceWith(document.importNode(now, true));
      return;
    }
    if (old.nodeType === Node.TEXT_NODE) {
      if (old.data !== now.data) old.data = now.data;
      return;
    }
    for (const { name } of [...old.attributes]) if (!now.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    const before = [...old.childNodes], after = [...now.childNodes];
    after.forEach((child, place) => {
      if (place < before.length) take(before[place], child);
      else old.append(document.importNode(child, true));
    });
    before.slice(after.length).forEach((child) => child.remove());
  }

  function say(why) {
    if (missing === why) return;
    missing = why;
    document.body.classList.toggle("stale", why !== "");
    stale.hidden = why === "";
    stale.textContent = why === "" ? "" : `Stale since ${last} UTC: ${why}. Below is what was true then.`;
  }

  async function refresh() {
    try {
      const answer = await fetch(location.pathname, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
      if (!answer.ok) return say(`the server answered ${answer.status}`);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const live = byId("live"), now = page.getElementById("live");
      if (!now) return say("the answer is not this page");
      if (paused) return;
      if (live.dataset.headline !== now.dataset.headline) announce.textContent = now.dataset.headline;
      document.title = page.title;
      last = now.dataset.at;
      take(live, now);
      fresh.textContent = `Live: ${last} UTC`;
      say("");
    } catch {
      say("the server does not answer");
    }
  }

  async function turn() {
    clearTimeout(timer);
    if (paused || document.hidden) return;
    await refresh();
    clearTimeout(timer);
    if (!paused && !document.hidden) timer = setTimeout(turn, EVERY_MS);
  }

  pause.addEventListener("click", () => {
    paused = !paused;
    pause.textContent = paused ? "Resume" : "Pause";
    fresh.textContent = paused ? `Paused: ${last} UTC` : `Live: ${last} UTC`;
    turn();
  });
  document.addEventListener("visibilitychange", turn);
  pause.hidden = false;
  fresh.textContent = `Live: ${last} UTC`;
  timer = setTimeout(turn, EVERY_MS);
})();
