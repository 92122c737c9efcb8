// The short-query load of scenarios/short.toml and an open loop, in k6: for those who have k6 in their pipeline.
//
//   k6 run loadtest/k6/embed.js -e TARGET=localhost:50051 -e RATE=200 -e SECONDS=30
//
// From the repository's root, because the proto is read from proto/. RATE calls a second, open loop (constant arrival
// rate); without RATE it is a closed loop of CALLERS (64). WORDS is FEWEST-MOST words of a text, TEXTS how many a call
// holds, TLS=1 speaks TLS. k6 counts a late start of an iteration as "dropped_iterations" and not as latency: look at it
// before you believe a percentile. `python -m loadtest run` needs far less CPU for the same rate and has no such gap.
import grpc from 'k6/net/grpc';
import exec from 'k6/execution';
import { check } from 'k6';
import { Counter, Trend } from 'k6/metrics';

const target = __ENV.TARGET || 'localhost:50051';
const rate = Number(__ENV.RATE || 0);
const duration = `${Number(__ENV.SECONDS || 15)}s`;
const callers = Number(__ENV.CALLERS || 64);
const texts = Number(__ENV.TEXTS || 1);
const [fewest, most] = (__ENV.WORDS || '5-12').split('-').map(Number);

const words = open('../words.txt').split(/\s+/).filter((word) => word);
const client = new grpc.Client();
client.load(['../../proto'], 'embedserve/v1/embedding.proto');

const refused = new Counter('embed_refused');
const vectors = new Counter('embed_vectors');
const queue = new Trend('embed_server_queue_ms');
const batch = new Trend('embed_batch_size');

export const options = {
  summaryTrendStats: ['min', 'med', 'p(90)', 'p(99)', 'max'],
  scenarios: {
    embed: rate
      ? { executor: 'constant-arrival-rate', rate, timeUnit: '1s', duration, preAllocatedVUs: callers, maxVUs: 10 * callers }
      : { executor: 'constant-vus', vus: callers, duration },
  },
  // A run that could not offer its rate, or was not answered, ends with exit code 99.
  thresholds: { checks: ['rate>0.99'], dropped_iterations: ['count==0'] },
};

function text() {
  const length = fewest + Math.floor(Math.random() * (most - fewest + 1));
  return Array.from({ length }, () => words[Math.floor(Math.random() * words.length)]).join(' ');
}

export default function () {
  if (exec.vu.iterationInScenario === 0) {
    client.connect(target, { plaintext: __ENV.TLS !== '1', timeout: '10s' });
  }
  const request = { texts: Array.from({ length: texts }, text), truncate: 'TRUNCATE_END' };
  const response = client.invoke('embedserve.v1.EmbeddingService/Embed', request, { timeout: '10s' });
  check(response, { answered: (r) => r && r.status === grpc.StatusOK });
  if (response.status === grpc.StatusResourceExhausted) {
    refused.add(1);
  } else if (response.status === grpc.StatusOK) {
    vectors.add(response.message.embeddings.length);
    queue.add(response.message.timings.queueMs);
    batch.add(response.message.embeddings[0].batchSize);
  }
}
