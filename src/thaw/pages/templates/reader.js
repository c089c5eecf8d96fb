// How a picture becomes a model's input: thaw.data.digit_image and thaw.data.pictures, in JavaScript.
// A picture is an ImageData; planes of numbers are row after row in one array. No shadow is removed from a picture.

const SIDE = 28, BOX = 20, CENTRE = 14;  // pixels: of the field, of the box that the digit fits, and its centre of mass
const WORKING_SIDE = 1024;  // pixels; larger pictures are reduced before the search for the digit
const UNEVEN_BORDER = 0.2, FAINTEST = 0.1, SPECK = 0.03, SECOND = 0.3, WIDE = 1.5, MAX_STROKES = 100;  // as in thaw.data.digit_image

const KERNELS = {  // Pillow's: how far each reaches, and its weight at a distance
  box: [0.5, x => x > -0.5 && x <= 0.5 ? 1 : 0],
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, x => {
    const far = Math.abs(x);
    if (far < 1) return (1.5 * far - 2.5) * far * far + 1;
    return far < 2 ? ((-0.5 * far + 2.5) * far - 4) * far + 2 : 0;
  }],
};

function roundEven(x) {  // as Python and numpy round: a half to the even number
  const low = Math.floor(x), rest = x - low;
  return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
}

function toByte(x) { return Math.min(255, Math.max(0, Math.floor(x + 0.5))); }

function resizeRows(plane, width, size, [reach, weightAt], finish) {  // the transpose, rows of the old height
  const height = plane.length / width, scale = width / size, stretch = Math.max(1, scale);
  const result = new Float32Array(size * height);
  for (let x = 0; x < size; x++) {
    const middle = (x + 0.5) * scale, weights = [];
    const first = Math.max(0, Math.trunc(middle - reach * stretch + 0.5));
    const end = Math.min(width, Math.trunc(middle + reach * stretch + 0.5));
    for (let at = first; at < end; at++) weights.push(weightAt((at - middle + 0.5) / stretch));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    for (let y = 0; y < height; y++) {
      let sum = 0;
      for (let i = 0; i < weights.length; i++) sum += weights[i] * plane[y * width + first + i];
      result[x * height + y] = finish(sum / total);
    }
  }
  return result;
}

function resize(plane, width, [newWidth, newHeight], kernel, finish = x => x) {
  const height = plane.length / width;
  return resizeRows(resizeRows(plane, width, newWidth, kernel, finish), height, newHeight, kernel, finish);
}

function cropped(plane, width, left, top, right, bottom) {
  const result = new Float32Array((right - left) * (bottom - top));
  for (let y = top; y < bottom; y++) result.set(plane.subarray(y * width + left, y * width + right), (y - top) * (right - left));
  return result;
}

function colours({ data }, ground) {  // three planes from 0 to 255; what is transparent shows the ground
  return [0, 1, 2].map(channel => {
    const plane = new Float32Array(data.length / 4);
    for (let i = 0; i < plane.length; i++) {
      const opacity = data[4 * i + 3] / 255;
      plane[i] = opacity === 1 ? data[4 * i + channel] : toByte(opacity * data[4 * i + channel] + (1 - opacity) * ground);
    }
    return plane;
  });
}

// ---- photographs: the centre square

function readPhoto(picture, [channels, high, wide]) {
  const { width, height } = picture, side = Math.min(width, height), size = Math.min(high, wide);
  const [left, top] = [width, height].map(length => Math.floor((length - side) / 2));
  let planes = colours(picture, 255).map(plane => cropped(plane, width, left, top, left + side, top + side));
  if (channels === 1) {  // ITU-R BT.601
    const [red, green, blue] = planes;
    planes = [red.map((_, i) => Math.floor((19595 * red[i] + 38470 * green[i] + 7471 * blue[i] + 32768) / 65536))];
  }
  const image = new Uint8Array(channels * high * wide);
  const [x, y] = [wide, high].map(length => Math.floor((length - size) / 2));
  planes.forEach((plane, channel) => {
    const small = resize(plane, side, [size, size], KERNELS.bicubic, toByte);
    for (let row = 0; row < size; row++) {
      image.set(small.subarray(row * size, (row + 1) * size), (channel * high + y + row) * wide + x);
    }
  });
  const doubts = [];
  if (side < 8) doubts.push("its short side has less than 8 pixels");
  if (Math.max(width, height) > 10 * side) doubts.push("its middle square is less than a tenth of it");
  return { image, warning: doubts.join("; ") };
}

// ---- digits: MNIST's rule

function readDigit(picture) {
  const opaque = picture.data.every((value, i) => i % 4 < 3 || value === 255);
  let planes = colours(picture, opaque ? 0 : groundFor(picture.data)), { width } = picture;
  const reduce = Math.min(1, WORKING_SIDE / Math.max(width, picture.height));
  if (reduce < 1) {
    const size = [width, picture.height].map(length => Math.max(1, roundEven(reduce * length)));
    planes = planes.map(plane => resize(plane, width, size, KERNELS.box, toByte));
    width = size[0];
  }
  const found = findStrokes(planes.map(plane => plane.map(value => value / 255)), width, 2);
  if (!found) return { error: "The picture shows no digit: all its pixels have about the same colour." };
  const { ink, box: [left, top, right, bottom] } = found;
  const tall = bottom - top, broad = right - left;
  let { doubt } = found;
  if (!doubt && broad > WIDE * tall) doubt = `it is wider than ${WIDE} times its height, so it may be more than one digit`;
  if (!doubt && isUneven(planes, width)) doubt = "its background is uneven, and this page, unlike predict.py, removes no shadow";
  return { image: centred(...fitBox(cropped(ink, found.width, left, top, right, bottom), broad)), warning: doubt };
}

function groundFor(data) {  // of a transparent picture: white, or black if the drawing is bright
  let sum = 0, opacity = 0;
  for (let i = 0; i < data.length; i += 4) {
    sum += data[i + 3] * (data[i] + data[i + 1] + data[i + 2]) / 3;
    opacity += data[i + 3];
  }
  return sum > 127 * opacity ? 0 : 255;
}

function border(plane, width) {  // its outermost pixels, sorted
  const height = plane.length / width, edge = Math.max(1, Math.floor(Math.min(width, height) / 50));
  return plane.filter((_, i) => {
    const x = i % width, y = (i - x) / width;
    return Math.min(x, width - 1 - x, y, height - 1 - y) < edge;
  }).sort();
}

function quantile(sorted, share) {
  const at = share * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

function isUneven(planes, width) {  // whether part of the border is darker than the rest, as in a shadow
  const grey = planes[0].map((red, i) => (red + planes[1][i] + planes[2][i]) / 3 / 255), edge = border(grey, width);
  const darkest = quantile(edge, 0.05), brightest = quantile(edge, 0.95);
  return brightest - darkest > Math.max(UNEVEN_BORDER * brightest, FAINTEST / 2);
}

function contrast(planes, width) {  // how far each pixel is from the median of the border, in the channel where it is most
  const grounds = planes.map(plane => border(plane, width)).map(edge => edge[roundEven(0.5 * (edge.length - 1))]);
  return planes[0].map((_, i) => Math.max(...planes.map((plane, channel) => Math.abs(plane[i] - grounds[channel]))));
}

function largest(plane) { return plane.reduce((most, value) => Math.max(most, value), 0); }

function otsu(plane) {  // the threshold that parts light and dark best (Otsu 1979), of 256 bins
  const least = plane.reduce((low, value) => Math.min(low, value), Infinity), step = (largest(plane) - least) / 256;
  const counts = new Float64Array(256);
  for (const value of plane) counts[Math.min(255, Math.floor((value - least) / step))] += 1;
  const centres = [...counts.keys()].map(bin => least + (bin + 0.5) * step);
  const sum = counts.reduce((all, count, bin) => all + count * centres[bin], 0);
  let below = 0, sumBelow = 0, best = -1, threshold = centres[0];
  for (let bin = 0; bin < 255; bin++) {
    below += counts[bin];
    sumBelow += counts[bin] * centres[bin];
    const above = plane.length - below, apart = sumBelow / below - (sum - sumBelow) / above;
    if (below * above * apart * apart > best) [best, threshold] = [below * above * apart * apart, centres[bin]];
  }
  return threshold;
}

function regions(isInside, width, height) {  // labels from 1, and the regions of pixels that touch, also at corners
  const labels = new Int32Array(width * height), found = [], stack = [];
  for (let start = 0; start < labels.length; start++) {
    if (labels[start] || !isInside(start)) continue;
    const label = found.length + 1, region = { label, left: width, top: height, right: 0, bottom: 0, pixels: [] };
    labels[start] = label;
    stack.push(start);
    while (stack.length) {
      const at = stack.pop(), x = at % width, y = (at - x) / width;
      region.pixels.push(at);
      region.left = Math.min(region.left, x);
      region.right = Math.max(region.right, x + 1);
      region.top = Math.min(region.top, y);
      region.bottom = Math.max(region.bottom, y + 1);
      for (let v = Math.max(0, y - 1); v <= Math.min(height - 1, y + 1); v++) {
        for (let u = Math.max(0, x - 1); u <= Math.min(width - 1, x + 1); u++) {
          const next = v * width + u;
          if (!labels[next] && isInside(next)) {
            labels[next] = label;
            stack.push(next);
          }
        }
      }
    }
    found.push(region);
  }
  return { labels, found };
}

function filled(stroke, labels, width) {  // which pixels of its box are the region or a hole in it, with a margin of one
  const wide = stroke.right - stroke.left + 2, high = stroke.bottom - stroke.top + 2;
  const isOutside = i => {
    const x = i % wide - 1 + stroke.left, y = Math.floor(i / wide) - 1 + stroke.top;
    const isIn = x >= stroke.left && x < stroke.right && y >= stroke.top && y < stroke.bottom;
    return !isIn || labels[y * width + x] !== stroke.label;
  };
  const outside = regions(isOutside, wide, high).labels;  // the first region holds the margin
  return { has: (x, y) => outside[(y - stroke.top + 1) * wide + x - stroke.left + 1] !== 1,
    area: outside.reduce((count, label) => count + (label !== 1), 0) };
}

function longer(stroke) { return Math.max(stroke.right - stroke.left, stroke.bottom - stroke.top); }

function encloses(outer, inner, width) {  // whether a region lies in a hole of another one and is not a speck
  const isAround = outer.top < inner.top && outer.left < inner.left && inner.bottom < outer.bottom && inner.right < outer.right;
  return isAround && longer(inner) >= 0.25 * longer(outer)
    && inner.pixels.every(at => outer.filled.has(at % width, Math.floor(at / width)));
}

function liesInside(stroke, width, height) {  // not along an edge of the picture from one end to the other
  const margin = Math.max(1, roundEven(0.1 * Math.min(width, height)));
  return stroke.right - stroke.left < width && stroke.bottom - stroke.top < height || stroke.pixels.some(at => {
    const x = at % width, y = Math.floor(at / width);
    return Math.min(x, width - 1 - x, y, height - 1 - y) >= margin;
  });
}

function findStrokes(planes, width, sheets) {  // { ink, width, box, doubt }, or null if there is no ink
  const ink = contrast(planes, width), height = ink.length / width;
  if (!(largest(ink) >= FAINTEST)) return null;
  const surely = otsu(ink), faint = Math.min(surely / 2, Math.max(0.05, 1.5 * quantile(border(ink, width), 0.98)));
  const { labels, found } = regions(i => ink[i] > faint, width, height);
  for (const stroke of found) {
    stroke.amount = stroke.pixels.reduce((sum, at) => sum + ink[at], 0);
    stroke.isSure = stroke.pixels.some(at => ink[at] >= surely);
  }
  const most = Math.max(...found.map(stroke => stroke.amount));
  const ones = found.filter(stroke => stroke.isSure).sort((a, b) => b.amount - a.amount).slice(0, MAX_STROKES);
  const plain = ones.filter(stroke => stroke.amount >= SPECK * most);
  let strokes = plain.length ? plain : ones;  // in noise all may be specks
  for (const stroke of strokes) stroke.filled = filled(stroke, labels, width);
  const sheet = strokes.reduce((a, b) => b.filled.area > a.filled.area ? b : a);
  const inside = sheets ? insideOf(sheet, planes, width, height) : null;
  if (inside) return findStrokes(inside.planes, inside.width, sheets - 1);
  const unframed = strokes.filter(stroke => !strokes.some(other => encloses(stroke, other, width)));
  const free = unframed.filter(stroke => liesInside(stroke, width, height));
  strokes = free.length ? free : unframed;
  const length = Math.max(...strokes.map(longer)), shapes = strokes.filter(stroke => longer(stroke) >= SECOND * length).length;
  const kept = new Float32Array(ink.length);
  for (const stroke of strokes) for (const at of stroke.pixels) kept[at] = ink[at];
  const ends = (side, choose) => choose(...strokes.map(stroke => stroke[side]));
  return {
    ink: kept, width, box: [ends("left", Math.min), ends("top", Math.min), ends("right", Math.max), ends("bottom", Math.max)],
    doubt: shapes > 1 ? `it shows ${shapes} separate shapes, so it may be more than one digit` : "",
  };
}

function insideOf(stroke, planes, width, height) {  // of a sheet of paper or a frame with something on it; null for a stroke
  const wide = stroke.right - stroke.left, high = stroke.bottom - stroke.top;
  const isFull = stroke.filled.area > 0.93 * wide * high && stroke.pixels.length > 0.65 * wide * high;
  const cut = 1 + roundEven(0.01 * Math.max(width, height));  // its blurred edge
  if (!isFull || high / wide <= 1 / 3 || high / wide >= 3 || Math.min(wide, high) <= 2 * cut) return null;
  const box = [stroke.left + cut, stroke.top + cut, stroke.right - cut, stroke.bottom - cut];
  const inside = planes.map(plane => cropped(plane, width, ...box));
  return largest(contrast(inside, wide - 2 * cut)) >= FAINTEST ? { planes: inside, width: wide - 2 * cut } : null;
}

function fitBox(digit, width) {  // scaled to fit 20 x 20 pixels with the same aspect ratio, the darkest ink 1; and its width
  const height = digit.length / width, scale = BOX / Math.max(width, height);
  const size = [width, height].map(length => Math.max(1, roundEven(scale * length)));
  const scaled = resize(digit, width, size, scale < 1 ? KERNELS.box : KERNELS.bilinear), most = largest(scaled);
  return [scaled.map(value => value / most), size[0]];
}

function centred(digit, width) {  // 28 x 28 with the centre of mass as near the centre as whole pixels and the field allow
  const height = digit.length / width, image = new Uint8Array(SIDE * SIDE);
  let total = 0, sumX = 0, sumY = 0;
  digit.forEach((value, i) => {
    total += value;
    sumX += value * (i % width);
    sumY += value * Math.floor(i / width);
  });
  const place = (mean, length) => Math.min(SIDE - length, Math.max(0, roundEven(CENTRE - mean)));
  const left = place(sumX / total, width), top = place(sumY / total, height);
  digit.forEach((value, i) => { image[(top + Math.floor(i / width)) * SIDE + left + i % width] = roundEven(255 * value); });
  return image;
}
