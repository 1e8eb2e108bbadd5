"use strict";
// Sorting and searching the concept cards. The page is complete without it.
const tools = document.querySelector(".tools");
if (tools) {
  const list = document.querySelector(".concepts");
  const cards = [...list.children];
  const texts = new Map(cards.map((card) => [card, card.textContent.replace(/\s+/g, " ").toLowerCase()]));
  const [search, order, shown] = ["input", "select", "output"].map((name) => tools.querySelector(name));
  const filter = () => {
    const wanted = search.value.trim().replace(/\s+/g, " ").toLowerCase();
    for (const card of cards) card.hidden = !texts.get(card).includes(wanted);
    const count = cards.filter((card) => !card.hidden).length;
    shown.textContent = `${count} of ${cards.length} shown`;
  };
  const sort = () => {
    const [name, direction] = order.value.split(" ");
    const by = (card) => Number(card.dataset[name]) * (direction === "down" ? -1 : 1);
    list.append(...[...cards].sort((a, b) => by(a) - by(b)));
  };
  search.addEventListener("input", filter);
  order.addEventListener("change", sort);
  tools.hidden = false;
  filter();
}
