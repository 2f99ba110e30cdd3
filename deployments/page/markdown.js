// What of Markdown answers use: code, headings, lists, quotes, bold, italic, links. Makes nodes, never markup: text stays
// text, whatever is in it, and a link leads to http or https.

const element = (tag, ...children) => {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
};

// In one pass: code, then bold, italic, links; none of them crosses a line.
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s()]+)\)|(https?:\/\/[^\s<>()"'`*]+)/g;

function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    const [, code, bold, italic, label, target, address] = match;
    if (code) parts.push(element("code", code));
    else if (bold) parts.push(element("strong", ...inline(bold)));
    else if (italic) parts.push(element("em", ...inline(italic)));
    else parts.push(link(label ?? address, target ?? address));
  }
  parts.push(text.slice(end));
  return parts.filter((part) => part !== "");
}

function link(label, target) {
  const node = element("a", label);
  node.href = target;
  node.rel = "noopener noreferrer";
  node.target = "_blank";
  return node;
}

const KINDS = [
  ["heading", /^#{1,6}\s+(.*)$/],
  ["ul", /^\s*[-*+]\s+(.*)$/],
  ["ol", /^\s*\d{1,9}[.)]\s+(.*)$/],
  ["quote", /^>\s?(.*)$/],
];

function kindOf(line) {
  for (const [kind, pattern] of KINDS) {
    const match = line.match(pattern);
    if (match) return [kind, match[1]];
  }
  return [line.trim() ? "text" : "blank", line];
}

/** The text as nodes; time and size grow with its length. */
export function markdown(text) {
  const whole = document.createDocumentFragment();
  const lines = text.split("\n");
  let open = null; // {kind, node or lines} that the next line may go on with
  const close = () => {
    if (open?.lines) {
      const content = open.lines.flatMap((line, index) => [...(index ? [element("br")] : []), ...inline(line)]);
      whole.append(element(open.kind === "quote" ? "blockquote" : "p", ...content));
    }
    open = null;
  };
  for (let index = 0; index < lines.length; index++) {
    const fence = lines[index].match(/^\s*(```+|~~~+)/);
    if (fence) {
      close();
      const code = [];
      while (++index < lines.length && !lines[index].trim().startsWith(fence[1])) code.push(lines[index]);
      whole.append(element("pre", element("code", code.join("\n"))));
      continue;
    }
    const [kind, content] = kindOf(lines[index]);
    if (open && open.kind !== kind) close();
    if (kind === "heading") {
      whole.append(element("h3", ...inline(content)));
    } else if (kind === "ul" || kind === "ol") {
      if (!open) {
        open = { kind, node: document.createElement(kind) };
        if (kind === "ol") open.node.start = parseInt(lines[index], 10);
        whole.append(open.node);
      }
      open.node.append(element("li", ...inline(content)));
    } else if (kind !== "blank") {
      open ??= { kind, lines: [] };
      open.lines.push(content);
    }
  }
  close();
  return whole;
}
