"use strict";
// A draft tree as a picture: the nodes that the server tells of a step become SVG. Loaded before page.js, which shows it.

const SVG = "http://www.w3.org/2000/svg";
const ROW = 34, GAP = 26, HEIGHT = 24, CHARACTER = 7.9;

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣").slice(0, 18);

function layout(nodes) {
  // Leaves take a row each, parents stand at their first child's height; columns are as wide as their widest token.
  const placed = nodes.map((node) => ({ ...node, label: visible(node.text), children: [] }));
  const top = { children: [], depth: 0 };
  for (const node of placed) {
    const parent = node.parent < 0 ? top : placed[node.parent];
    node.depth = parent.depth + 1;
    parent.children.push(node);
  }
  let rows = 0;
  const place = (node) => {
    node.row = rows;
    node.children.forEach((child, i) => {
      if (i) rows += 1;
      place(child);
    });
  };
  place(top);
  const widths = [];
  for (const node of placed) {
    node.share = node.log_prob === null ? "" : `${Math.round(100 * Math.exp(node.log_prob))}%`;
    node.width = (node.label.length * CHARACTER) + (node.share ? 42 : 14);
    widths[node.depth] = Math.max(widths[node.depth] || 0, node.width);
  }
  const lefts = [0];
  for (let depth = 1; depth < widths.length; depth += 1) lefts[depth] = (lefts[depth - 1] || 0) + (widths[depth - 1] || 0) + GAP;
  return { placed, lefts, width: lefts[lefts.length - 1] + (widths[widths.length - 1] || 0) + 2, height: (rows + 1) * ROW };
}

function picture(nodes) {
  const { placed, lefts, width, height } = layout(nodes);
  const edges = [], boxes = [];
  const middle = (row) => row * ROW + HEIGHT / 2 + 1;
  for (const node of placed) {
    const x = lefts[node.depth], y = middle(node.row);
    const parent = node.parent < 0 ? null : placed[node.parent];
    const from = parent ? lefts[parent.depth] + parent.width : 6, fromY = parent ? middle(parent.row) : middle(0);
    const taken = node.accepted ? "taken" : "";
    const edge = svg("path", { class: taken, d: `M${from} ${fromY} C${from + 14} ${fromY} ${x - 14} ${y} ${x} ${y}` });
    if (node.accepted) edges.push(edge); else edges.unshift(edge);
    const parts = [
      svg("rect", { x, y: y - HEIGHT / 2, width: node.width, height: HEIGHT, rx: 6 }),
      svg("text", { x: x + 7, y: y + 4.5 }, node.label),
    ];
    if (node.share) {
      const end = x + node.width - 6;
      parts.push(svg("text", { x: end, y: y + 4, class: "share", "text-anchor": "end" }, node.share));
    }
    boxes.push(svg("g", { class: taken }, ...parts));
  }
  const root = svg("circle", { cx: 4, cy: middle(0), r: 4, fill: "currentColor" });
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, ...edges, root, ...boxes);
}
