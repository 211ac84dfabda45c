// Tabs as the ARIA practices describe them: arrow keys move, one tab stop, and the address remembers the view.

/** `show(name)` is called with the chosen tab's name, once at the start too. */
export function makeTabs(root, show) {
  const tabs = [...root.querySelectorAll("[role=tab]")];
  const names = tabs.map((tab) => tab.dataset.view);
  const choose = (name, focus = false) => {
    tabs.forEach((tab) => {
      const chosen = tab.dataset.view === name;
      tab.setAttribute("aria-selected", chosen);
      tab.tabIndex = chosen ? 0 : -1;
      if (chosen && focus) tab.focus();
    });
    if (location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
    show(name);
  };
  root.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) choose(tab.dataset.view);
  });
  root.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    choose(names.at(to % tabs.length), true);
  });
  const named = () => (names.includes(location.hash.slice(1)) ? location.hash.slice(1) : names[0]);
  addEventListener("hashchange", () => choose(named()));
  choose(named());
}
