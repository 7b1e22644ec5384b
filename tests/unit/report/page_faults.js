// Faults of the layout of a page, one line each.
() => {
  const faults = [], wide = document.documentElement.clientWidth;
  const name = (element) => {
    const style = element.className.baseVal ?? element.className;
    return `<${element.tagName} ${style}> "${element.textContent.trim().slice(0, 40)}"`;
  };
  const box = (element) => element.getBoundingClientRect();
  const shown = (element) => box(element).width > 0 && box(element).height > 0;
  const over = (a, b) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const apart = (elements) => {
    const boxes = elements.filter(shown).map((element) => [element, box(element)]);
    boxes.forEach(([first, a], number) => boxes.slice(number + 1).forEach(([second, b]) => {
      if (over(a, b)) faults.push(`${name(first)} is over ${name(second)}`);
    }));
  };
  if (document.documentElement.scrollWidth > wide) faults.push(`the page is ${document.documentElement.scrollWidth} wide`);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  for (const chart of all("svg")) {
    const frame = box(chart);
    for (const text of all("text", chart)) {
      const own = box(text);
      const across = own.left < frame.left - 1 || own.right > frame.right + 1;
      if (across || own.top < frame.top - 1 || own.bottom > frame.bottom + 1) faults.push(`${name(text)} is clipped`);
      if (own.height < 9) faults.push(`${name(text)} is ${own.height} high`);
    }
    apart(all("text", chart));
  }
  for (const words of all("h1, h2, h3, p, summary, figcaption, .bars .name, .bars .value, .legend li, nav a, .ticks span")) {
    const own = box(words);
    if (shown(words) && (own.left < -1 || own.right > wide + 1)) faults.push(`${name(words)} leaves the page`);
    if (words.scrollWidth > words.clientWidth + 1 && words.clientWidth) faults.push(`${name(words)} is clipped`);
  }
  for (const list of all(".bars li, .ticks, .legend, nav, .row, .figures, .pictures")) apart([...list.children]);
  for (const section of all("section")) apart([...section.children]);
  apart(all(".bars .value, .bars .name"));
  apart(all("main > section, main > nav, header"));
  for (const table of all(".table")) if (shown(table) && box(table).right > wide + 1) faults.push(`${name(table)} leaves the page`);
  for (const cell of all("th, td")) if (cell.scrollWidth > cell.clientWidth + 1) faults.push(`${name(cell)} is clipped`);
  return faults;
}
