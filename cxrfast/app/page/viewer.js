// The film and the heat map over it: two canvases of the same shape, one under the other.

const $ = (id) => document.getElementById(id);

// matplotlib's inferno, as in the figures of `cxrfast gradcam`: light grows with the value, readable without red or green.
const INFERNO = [
  [0, 0, 4], [22, 11, 57], [66, 10, 104], [106, 23, 110], [147, 38, 103], [188, 55, 84],
  [221, 81, 58], [243, 120, 25], [252, 165, 10], [246, 215, 70], [252, 255, 164],
];

function colour(value) {
  const at = (value / 255) * (INFERNO.length - 1);
  const low = Math.min(Math.floor(at), INFERNO.length - 2);
  return INFERNO[low].map((part, i) => Math.round(part + (INFERNO[low + 1][i] - part) * (at - low)));
}

const COLOURS = Array.from({ length: 256 }, (_, value) => colour(value));

export function drawLegend() {
  const canvas = $("legend");
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    const value = (255 * x) / (canvas.width - 1);
    context.fillStyle = `rgba(${colour(value).join(",")},${alpha(value)})`;
    context.fillRect(x, 0, 1, 1);
  }
}

// Where the map is low, the film is seen without it.
const alpha = (value) => Math.min(1, (1.3 * value) / 255);

let drawing = 0;

// Draws a picture (a Blob) as a film of this shape. Returns false if another film was drawn in the meantime.
export async function drawFilm(picture, width, height) {
  const mine = ++drawing;
  const bitmap = await createImageBitmap(picture);
  if (mine !== drawing) return false;
  const canvas = $("film");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  $("sheet").style.aspectRatio = `${width} / ${height}`;
  $("stage").style.setProperty("--shape", width / height);
  $("sheet").hidden = false;
  $("hint").hidden = true;
  return true;
}

// Draws a map: { side, values: Uint8Array of side × side }, or nothing.
export function drawHeat(map) {
  const canvas = $("heat");
  canvas.hidden = !map;
  if (!map) return;
  canvas.width = canvas.height = map.side;
  const context = canvas.getContext("2d");
  const image = context.createImageData(map.side, map.side);
  map.values.forEach((value, i) => {
    image.data.set([...COLOURS[value], Math.round(255 * alpha(value))], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

export function clear() {
  drawing++;
  $("sheet").hidden = true;
  $("hint").hidden = false;
  drawHeat(null);
}

// Where a map is strongest, in words.
export function strongest(map) {
  const at = map.values.indexOf(map.values.reduce((a, b) => Math.max(a, b), 0));
  const third = (position) => Math.min(2, Math.floor((3 * (position + 0.5)) / map.side));
  const row = ["upper", "middle", "lower"][third(Math.floor(at / map.side))];
  const column = ["left", "centre", "right"][third(at % map.side)];
  return row === "middle" && column === "centre" ? "in the centre of the picture" : `at the ${row} ${column} of the picture`;
}

const ZOOMS = [1, 1.5, 2, 3, 4, 6];
let zoom = 0;

export function zoomBy(steps) {
  const stage = $("stage");
  const centre = [
    (stage.scrollLeft + stage.clientWidth / 2) / stage.scrollWidth,
    (stage.scrollTop + stage.clientHeight / 2) / stage.scrollHeight,
  ];
  zoom = steps === 0 ? 0 : Math.max(0, Math.min(ZOOMS.length - 1, zoom + steps));
  $("sheet").style.setProperty("--zoom", ZOOMS[zoom]);
  $("zoom-text").textContent = `${Math.round(100 * ZOOMS[zoom])} %`;
  $("smaller").disabled = zoom === 0;
  $("larger").disabled = zoom === ZOOMS.length - 1;
  stage.scrollLeft = centre[0] * stage.scrollWidth - stage.clientWidth / 2;
  stage.scrollTop = centre[1] * stage.scrollHeight - stage.clientHeight / 2;
}
