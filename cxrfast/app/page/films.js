// The films of this page, what is known about each, and the one request that is under way. Nothing is stored.

const MOST_FILMS = 500;
const MOST_PICTURES = 12; // films whose pictures and maps are kept; others are asked for again

export const films = [];
let next = 1;

// Adds files to the list. Returns a sentence if some are left out, else "".
export function add(files) {
  const room = MOST_FILMS - films.length;
  for (const file of files.slice(0, room)) {
    films.push({ id: next++, file, name: file.name, state: "waiting", error: "", scores: null, pictures: null, maps: new Map(), used: 0 });
  }
  const left = files.length - room;
  return left > 0 ? `${left} films were left out: the list holds ${MOST_FILMS}. Remove some first.` : "";
}

export function remove(film) {
  films.splice(films.indexOf(film), 1);
  film.state = "removed";
}

let clock = 0;

// Marks a film as the one looked at, and forgets pictures and maps of the films looked at longest ago.
export function use(film) {
  film.used = ++clock;
  const kept = films.filter((one) => one.pictures || one.maps.size).sort((a, b) => b.used - a.used);
  for (const old of kept.slice(MOST_PICTURES)) {
    old.pictures = null;
    old.maps.clear();
  }
}

export const mapKey = (finding, scale) => `${finding}/${scale}`;

// The next question to ask: the film looked at comes first, and what it shows now before the rest.
export function nextTask(chosen, finding, scale, scales, wantsMaps) {
  if (chosen && chosen.state !== "error") {
    if (!chosen.pictures) return { film: chosen, question: "pictures" };
    if (!chosen.scores) return { film: chosen, question: "scores" };
    if (wantsMaps) {
      const nearest = [...scales].sort((a, b) => Math.abs(Math.log(a / scale)) - Math.abs(Math.log(b / scale)));
      for (const one of nearest) {
        if (!chosen.maps.has(mapKey(finding, one))) return { film: chosen, question: "map", finding, scale: one };
      }
    }
  }
  const waiting = films.find((film) => film.state === "waiting");
  return waiting ? { film: waiting, question: "scores" } : null;
}

// Sends a film and returns the answer. Throws an Error with a sentence for the user.
export async function ask({ film, question, finding, scale }, largest) {
  if (film.file.size > largest) {
    throw new Error(`This file is too large: films have at most ${Math.round(largest / 1e6)} MB.`);
  }
  const body = await film.file.arrayBuffer().catch(() => {
    throw new Error("This is not a file that the browser can read (a folder, or it was moved).");
  });
  const query = question === "map" ? `?scale=${scale}&finding=${finding}` : "";
  let answer;
  for (let tries = 0; ; tries++) {
    answer = await fetch(`api/${question}${query}`, {
      method: "POST",
      body,
      headers: { "content-type": "application/octet-stream" },
    }).catch(() => {
      throw new Error("The app does not answer. Is it still running in its terminal?");
    });
    if (answer.status !== 503 || tries === 5) break;
    await new Promise((done) => setTimeout(done, 2000)); // other pages of this app use it, too
  }
  const found = await answer.json().catch(() => ({ error: `the app answered with status ${answer.status}` }));
  if (!answer.ok) throw new Error(sentence(found.error));
  return found;
}

export function sentence(words) {
  const text = String(words).trim();
  return (text.startsWith("cxrfast") ? "" : text.charAt(0).toUpperCase()) + text.slice(text.startsWith("cxrfast") ? 0 : 1) + (/[.!?]$/.test(text) ? "" : ".");
}

export function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}
