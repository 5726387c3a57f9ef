"use strict";
const test = require("node:test");
const assert = require("node:assert");
const path = require("node:path");
const { readFileSync } = require("node:fs");
const report = require(path.join(__dirname, "..", "..", "eval", "report", "report.js"));

const REPLAY = {
  pieces: ["a", "b", "c", "d", "e"],
  step: [0, 0, 1, 0, 3],
  how: ["accepted", "accepted", "unmasked", "resampled", "unmasked"],
  rank: [1, 0, 0, 2, 0],
  confidence: [0.99, 0.98, 0.95, 0.4, 0.3],
  verified: [[0, 5, 2]],
  threshold: 0.9,
};

test("rows sort both ways, missing values last, equal ones as they were", () => {
  const rows = [{ n: 2, id: "a" }, { n: null, id: "b" }, { n: 1, id: "c" }, { n: 2, id: "d" }];
  const ids = (descending) => report.sortRows(rows, (r) => r.n, descending).map((r) => r.id).join("");
  assert.equal(ids(false), "cadb");
  assert.equal(ids(true), "adcb");
  assert.equal(report.sortRows([{ s: "b" }, { s: "a" }], (r) => r.s, false)[0].s, "a");
});

test("McNemar agrees with what Python computed", () => {
  for (const { first, second, expected } of JSON.parse(readFileSync(process.env.MCNEMAR_CASES, "utf8"))) {
    const found = report.mcnemar(first, second);
    assert.deepEqual([found.better, found.worse], expected.slice(0, 2));
    assert.ok(Math.abs(found.p - expected[2]) < 1e-9, `${found.p} ${expected[2]}`);
  }
  assert.equal(report.mcnemar("01", "0"), null);
});

test("a step costs a forward, a verified one two, an idle one too", () => {
  const frames = report.framesOf(REPLAY);
  assert.deepEqual(frames.map((f) => f.forwards), [2, 3, 4, 5]);
  assert.deepEqual(frames.map((f) => f.positions), [[1, 0, 3], [2], [], [4]]);
  assert.deepEqual(frames[0].verify, [5, 2]);
  assert.equal(frames[1].verify, null);
});

test("several verifies in a step cost a forward each", () => {
  const frames = report.framesOf({ ...REPLAY, verified: [[0, 5, 2], [0, 3, 3], [3, 1, 0]] });
  assert.deepEqual(frames.map((f) => f.forwards), [3, 4, 5, 7]);
  assert.deepEqual(frames.map((f) => f.verify), [[8, 5], null, null, [1, 0]]);
});

test("forwards by lane and losslessness in words", () => {
  assert.equal(report.byLane({ lane_forwards_per_token: { target: 0.25, drafter: 1 } }), "target 0.250, drafter 1.000");
  assert.equal(report.byLane({}), "");
  assert.equal(report.losslessTitle({ lossless: true, lossless_reason: "why", lossless_relative_to: "block size one" }), "as block size one: why");
  assert.equal(report.losslessTitle({ lossless: null }), null);
});

test("without a threshold what the rule fills is a fallback", () => {
  const tokens = report.tokensAfter({ ...REPLAY, threshold: null }, report.framesOf(REPLAY), 4);
  assert.deepEqual(tokens.map((t) => t.by), ["accepted", "accepted", "fallback", "resampled", "fallback"]);
});

test("tokens appear in decoding order with what decided them", () => {
  const frames = report.framesOf(REPLAY);
  const at = (done) => report.tokensAfter(REPLAY, frames, done).map((t) => (t ? t.by : "-"));
  assert.deepEqual(at(0), ["-", "-", "-", "-", "-"]);
  assert.deepEqual(at(1), ["accepted", "accepted", "-", "resampled", "-"]);
  assert.deepEqual(at(4), ["accepted", "accepted", "confident", "resampled", "fallback"]);
  const tokens = report.tokensAfter(REPLAY, frames, 2);
  assert.deepEqual(tokens.map((t) => Boolean(t && t.fresh)), [false, false, true, false, false]);
});

test("an edited position shows its old token until it is edited", () => {
  const edited = { ...REPLAY, edits: [[2, 0, "x", "y"], [4, 0, "y", "a"]] };
  const frames = report.framesOf(edited);
  const first = (done) => report.tokensAfter(edited, frames, done)[0];
  assert.equal(frames.length, 5);
  assert.equal(first(1).piece, "x");
  assert.deepEqual([first(3).piece, first(3).by], ["y", "edited"]);
  assert.equal(first(5).piece, "a");
});

test("the clock moves to the next change of either decode, and back", () => {
  const frames = report.framesOf(REPLAY);
  const other = [{ forwards: 1 }, { forwards: 7 }];
  assert.equal(report.nextMoment([frames, other], 0, 1), 1);
  assert.equal(report.nextMoment([frames, other], 5, 1), 7);
  assert.equal(report.nextMoment([frames, other], 7, 1), 7);
  assert.equal(report.nextMoment([frames, other], 3, -1), 2);
  assert.equal(report.nextMoment([frames, other], 1, -1), 0);
  assert.equal(report.framesDone(frames, 3), 2);
  assert.equal(report.framesDone(frames, 1), 0);
});

test("probabilities are short", () => {
  assert.deepEqual([null, 0.0001, 0.0312, 0.5].map(report.shownP), ["", "< 0.001", "0.031", "0.50"]);
});
