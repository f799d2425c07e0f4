/** Numbers as they are read: few digits, the same width. */

/** A distance: three digits after the point below 0.1, two up to 10. */
export function distance(value) {
	if (isNaN(value)) return "–";
	if (!isFinite(value)) return value > 0 ? "∞" : "−∞";
	const size = Math.abs(value);
	if (size >= 1e4) return signed(value.toExponential(1));
	return signed(value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.095 ? 2 : size >= 0.00095 || !size ? 3 : 4));
}

export const difference = (value) => (value > 0 ? "+" : "") + distance(value);

/** A distance, or a difference, in few characters, for a cell of the heatmap. */
export function brief(value, isDifference) {
	const rounded = Math.abs(value) < 0.0005 ? 0 : value;
	return (isDifference ? difference : distance)(rounded).replace(/^([+−]?)0\./, "$1.");
}

/** Any number to four digits. */
export function general(value) {
	if (!isFinite(value)) return distance(value);
	return Number.isInteger(value) && Math.abs(value) < 1e7 ? whole(value) : signed(String(Number(value.toPrecision(4))));
}

/** A whole number with thin spaces between thousands. */
export const whole = (value) => signed(String(value).replace(/\B(?=(\d{3})+$)/g, "\u2009"));

export const count = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;

/** About so many round values from low to high. */
export function ticks(low, high, about) {
	if (!(high > low)) return [low];
	const raw = (high - low) / about;
	const unit = 10 ** Math.floor(Math.log10(raw));
	const step = [1, 2, 5, 10].find((factor) => factor * unit >= raw * 0.999) * unit;
	const first = Math.ceil(low / step - 1e-9);
	return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

const signed = (text) => text.replace("-", "−");
