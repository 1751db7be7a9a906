//! What the summoner counts and measures, for Prometheus.
//!
//! [`Metrics`] holds the numbers, [`Metrics::text`] writes them (OpenMetrics 1.0, which Prometheus reads), and [`serve`] answers
//! `GET /metrics` with them. Names begin with `kiln_summon_`.
//!
//! What always holds: the number of series is bounded. Units beyond the first [`MAX_UNITS`] share the label `other`, and clients
//! cannot make labels at all.

use std::{
    collections::HashSet,
    convert::Infallible,
    fmt,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{
        TypedMetric,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
        histogram::Histogram,
        info::Info,
    },
    registry::{Registry, Unit},
};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};

use crate::dns;

/// Units with a label of their own.
pub const MAX_UNITS: usize = 1000;
/// Most clients served at once; others wait.
const MAX_CLIENTS: usize = 8;
/// Longest head of a request in bytes (hyper's least).
const HEAD_BYTES: usize = 8192;
/// Longest time for a request to come.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for one client in all.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(20);
/// Rest after a connection could not be accepted, as when no descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bounds of the times to readiness, in seconds.
const READY_BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];
/// The label of units beyond [`MAX_UNITS`].
const OTHER: &str = "other";

/// One label.
type Label = [(&'static str, String); 1];
type Counters = Family<Label, Counter>;
type Seconds = Gauge<f64, AtomicU64>;

/// All numbers. Cheap to share behind an [`Arc`]; counting never waits for a scrape.
pub struct Metrics {
    registry: Registry,
    states: Family<Label, Gauge>,
    time_to_ready: Family<Label, Histogram, fn() -> Histogram>,
    queries: Counters,
    knocks: Counters,
    starts: Counters,
    failures: Counters,
    stops: Counters,
    connections: Family<Label, Gauge>,
    last_ready: Family<Label, Seconds>,
    /// Memory of all running units, in bytes.
    pub memory: Gauge,
    /// Units stopped because a ceiling (`max_running`, `max_memory`) was reached.
    pub evictions: Counter,
    /// Running units that an earlier summoner had started.
    pub adopted: Counter,
    /// Reloads of the configuration that succeeded.
    pub reloads: Counter,
    /// Reloads that were refused because of mistakes in the configuration.
    pub reload_failures: Counter,
    labelled: Mutex<HashSet<String>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// The numbers of one unit. Clones count together.
#[derive(Clone)]
pub struct UnitMetrics {
    /// DNS questions for its names.
    pub queries: Counter,
    /// Connections and datagrams that came while it did not run.
    pub knocks: Counter,
    /// Starts, also those that failed.
    pub starts: Counter,
    /// Starts after which it did not become ready.
    pub failures: Counter,
    /// Ends, suspensions too.
    pub stops: Counter,
    /// Open connections when last asked.
    pub connections: Gauge,
    last_ready: Seconds,
    time_to_ready: Family<Label, Histogram, fn() -> Histogram>,
    states: Family<Label, Gauge>,
    state: Arc<Mutex<Option<&'static str>>>,
}

impl fmt::Debug for UnitMetrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("UnitMetrics")
            .finish_non_exhaustive()
    }
}

impl UnitMetrics {
    /// Says in which state it is; the words become the label `state`.
    pub fn set_state(&self, state: &'static str) {
        self.change_state(Some(state));
    }

    fn change_state(&self, state: Option<&'static str>) {
        let mut current = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == state {
            return;
        }
        if let Some(old) = *current {
            self.states.get_or_create(&label("state", old)).dec();
        }
        if let Some(new) = state {
            self.states.get_or_create(&label("state", new)).inc();
        }
        *current = state;
    }

    /// It became ready, and how long that took; from nothing, or from its suspension.
    pub fn became_ready(&self, took: Duration, from_suspension: bool) {
        let from = if from_suspension { "suspended" } else { "cold" };
        self.last_ready.set(took.as_secs_f64());
        self.time_to_ready
            .get_or_create(&label("from", from))
            .observe(took.as_secs_f64());
    }
}

fn label(name: &'static str, value: &str) -> Label {
    [(name, value.to_owned())]
}

fn ready_histogram() -> Histogram {
    Histogram::new(READY_BUCKETS)
}

impl Metrics {
    /// Everything at zero. `dns` is asked at each scrape for what the name server has counted.
    #[must_use]
    pub fn new(dns: impl Fn() -> dns::Statistics + Send + Sync + 'static) -> Self {
        let mut registry = Registry::with_prefix("kiln_summon");
        let mut metrics = Self {
            registry: Registry::default(),
            states: Family::default(),
            time_to_ready: Family::new_with_constructor(ready_histogram),
            queries: Family::default(),
            knocks: Family::default(),
            starts: Family::default(),
            failures: Family::default(),
            stops: Family::default(),
            connections: Family::default(),
            last_ready: Family::default(),
            memory: Gauge::default(),
            evictions: Counter::default(),
            adopted: Counter::default(),
            reloads: Counter::default(),
            reload_failures: Counter::default(),
            labelled: Mutex::default(),
        };
        let started = Seconds::default();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        started.set(now.as_secs_f64());
        registry.register(
            "build",
            "Version of Kiln",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        registry.register_with_unit(
            "start_time",
            "When the summoner started, since 1970",
            Unit::Seconds,
            started,
        );
        registry.register("units", "Units by state", metrics.states.clone());
        registry.register_with_unit(
            "time_to_ready",
            "From the start of a unit to its readiness",
            Unit::Seconds,
            metrics.time_to_ready.clone(),
        );
        let of_units = [
            (
                "unit_queries",
                "DNS questions for a unit's names",
                &metrics.queries,
            ),
            (
                "unit_knocks",
                "Connections and datagrams that came while a unit did not run",
                &metrics.knocks,
            ),
            ("unit_starts", "Starts of a unit", &metrics.starts),
            (
                "unit_failures",
                "Starts after which a unit did not become ready",
                &metrics.failures,
            ),
            (
                "unit_stops",
                "Ends and suspensions of a unit",
                &metrics.stops,
            ),
        ];
        for (name, help, counters) in of_units {
            registry.register(name, help, counters.clone());
        }
        registry.register(
            "unit_connections",
            "Open connections of a unit when last asked",
            metrics.connections.clone(),
        );
        registry.register_with_unit(
            "unit_last_ready",
            "How long the last start of a unit took until it was ready",
            Unit::Seconds,
            metrics.last_ready.clone(),
        );
        registry.register_with_unit(
            "memory",
            "Memory of all running units",
            Unit::Bytes,
            metrics.memory.clone(),
        );
        let of_all = [
            (
                "evictions",
                "Units stopped because a ceiling was reached",
                &metrics.evictions,
            ),
            (
                "adopted",
                "Running units taken over from an earlier summoner",
                &metrics.adopted,
            ),
            ("reloads", "Reloads of the configuration", &metrics.reloads),
            (
                "reload_failures",
                "Reloads refused because of mistakes",
                &metrics.reload_failures,
            ),
        ];
        for (name, help, counter) in of_all {
            registry.register(name, help, counter.clone());
        }
        registry.register_collector(Box::new(NameServer(Box::new(dns))));
        metrics.registry = registry;
        metrics
    }

    /// The numbers of a unit, which begin at zero and stay until [`Metrics::forget`].
    #[must_use]
    pub fn unit(&self, name: &str) -> UnitMetrics {
        let own = {
            let mut labelled = self.labelled.lock().unwrap_or_else(PoisonError::into_inner);
            if labelled.len() < MAX_UNITS {
                labelled.insert(name.to_owned());
            }
            labelled.contains(name)
        };
        let label = label("unit", if own { name } else { OTHER });
        UnitMetrics {
            queries: self.queries.get_or_create_owned(&label),
            knocks: self.knocks.get_or_create_owned(&label),
            starts: self.starts.get_or_create_owned(&label),
            failures: self.failures.get_or_create_owned(&label),
            stops: self.stops.get_or_create_owned(&label),
            connections: self.connections.get_or_create_owned(&label),
            last_ready: self.last_ready.get_or_create_owned(&label),
            time_to_ready: self.time_to_ready.clone(),
            states: self.states.clone(),
            state: Arc::default(),
        }
    }

    /// A unit is gone: its numbers go too.
    pub fn forget(&self, name: &str, unit: &UnitMetrics) {
        unit.change_state(None);
        let own = self
            .labelled
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        if own {
            let label = label("unit", name);
            for family in [
                &self.queries,
                &self.knocks,
                &self.starts,
                &self.failures,
                &self.stops,
            ] {
                family.remove(&label);
            }
            self.connections.remove(&label);
            self.last_ready.remove(&label);
        }
    }

    /// All numbers as text in the OpenMetrics format.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string fails only if a number cannot be written, and then the rest is of use.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// What the name server has counted, read at each scrape.
struct NameServer(Box<dyn Fn() -> dns::Statistics + Send + Sync>);

impl fmt::Debug for NameServer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("NameServer")
    }
}

/// Counters of the name server that differ only in one word: beginning, name, label, meaning.
const GROUPS: [(&str, &str, &str, &str); 3] = [
    (
        "query_",
        "dns_queries",
        "type",
        "Questions answered from here, by type",
    ),
    ("answer_", "dns_answers", "code", "Answers by response code"),
    (
        "dropped_",
        "dns_dropped",
        "reason",
        "Messages dropped, by reason",
    ),
];

impl Collector for NameServer {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let all: Vec<(&str, u64)> = (self.0)().all().collect();
        let kind = Counter::<u64, AtomicU64>::TYPE;
        for (beginning, name, word, meaning) in GROUPS {
            let mut family = encoder.encode_descriptor(name, meaning, None, kind)?;
            for (name, value) in &all {
                if let Some(rest) = name.strip_prefix(beginning) {
                    ConstCounter::new(*value).encode(family.encode_family(&[(word, rest)])?)?;
                }
            }
        }
        for (name, value) in &all {
            if !GROUPS
                .iter()
                .any(|(beginning, ..)| name.starts_with(beginning))
            {
                let name = format!("dns_{name}");
                let metric =
                    encoder.encode_descriptor(&name, "Counted by the name server", None, kind)?;
                ConstCounter::new(*value).encode(metric)?;
            }
        }
        Ok(())
    }
}

/// Answers `GET /metrics` for ever; dropping the future ends it, with all connections served later at the end of their time.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>) -> Infallible {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&clients).acquire_owned().await else {
            continue;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the metrics endpoint cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let metrics = Arc::clone(&metrics);
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let response = answer(&request, &metrics);
                async { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(HEAD_BYTES)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // A client that goes away, is slow or speaks nonsense ends its own connection only.
            let _ = timeout(CLIENT_TIMEOUT, connection).await;
            drop(place);
        });
    }
}

fn answer<B>(request: &Request<B>, metrics: &Metrics) -> Response<String> {
    let with = |status: StatusCode, kind: &'static str, body: String| {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        response
    };
    const PLAIN: &str = "text/plain; charset=utf-8";
    if request.uri().path() != "/metrics" {
        return with(
            StatusCode::NOT_FOUND,
            PLAIN,
            "the metrics are at /metrics\n".into(),
        );
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = with(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "use GET\n".into());
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    with(StatusCode::OK, kind, metrics.text())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    fn metrics() -> Metrics {
        Metrics::new(|| dns::Statistics {
            query_a: 7,
            answer_nxdomain: 2,
            dropped_malformed: 3,
            udp: 11,
            ..dns::Statistics::default()
        })
    }

    #[test]
    fn all_numbers_are_in_the_text() {
        let metrics = metrics();
        let www = metrics.unit("www");
        www.set_state("cold");
        www.set_state("starting");
        www.set_state("starting");
        www.starts.inc();
        www.queries.inc_by(3);
        www.became_ready(Duration::from_millis(40), false);
        metrics.memory.set(64 << 20);
        let text = metrics.text();
        for line in [
            "kiln_summon_units{state=\"cold\"} 0",
            "kiln_summon_units{state=\"starting\"} 1",
            "kiln_summon_unit_starts_total{unit=\"www\"} 1",
            "kiln_summon_unit_failures_total{unit=\"www\"} 0",
            "kiln_summon_unit_queries_total{unit=\"www\"} 3",
            "kiln_summon_unit_last_ready_seconds{unit=\"www\"} 0.04",
            "kiln_summon_time_to_ready_seconds_bucket{le=\"0.03\",from=\"cold\"} 0",
            "kiln_summon_time_to_ready_seconds_bucket{le=\"0.05\",from=\"cold\"} 1",
            "kiln_summon_time_to_ready_seconds_count{from=\"cold\"} 1",
            "kiln_summon_memory_bytes 67108864",
            "kiln_summon_dns_queries_total{type=\"a\"} 7",
            "kiln_summon_dns_answers_total{code=\"nxdomain\"} 2",
            "kiln_summon_dns_dropped_total{reason=\"malformed\"} 3",
            "kiln_summon_dns_udp_total 11",
        ] {
            assert!(
                text.lines().any(|one| one == line),
                "{line} is not in\n{text}"
            );
        }
        assert!(text.ends_with("# EOF\n"));
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(series.starts_with("kiln_summon_"), "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }

    #[test]
    fn units_go_and_their_number_is_bounded() {
        let metrics = metrics();
        let gone = metrics.unit("gone");
        gone.set_state("ready");
        metrics.forget("gone", &gone);
        assert!(!metrics.text().contains("gone"));
        assert!(
            metrics
                .text()
                .contains("kiln_summon_units{state=\"ready\"} 0")
        );
        let many: Vec<UnitMetrics> = (0..MAX_UNITS + 10)
            .map(|index| metrics.unit(&format!("u{index}")))
            .collect();
        for unit in &many {
            unit.starts.inc();
        }
        let text = metrics.text();
        let starts = text
            .lines()
            .filter(|line| line.starts_with("kiln_summon_unit_starts_total"));
        assert_eq!(starts.count(), MAX_UNITS + 1);
        assert!(text.contains("kiln_summon_unit_starts_total{unit=\"other\"} 10"));
    }

    async fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // A server that has heard enough may close before everything is written.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[tokio::test]
    async fn the_endpoint_answers_one_path_and_refuses_the_rest() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, Arc::new(metrics())));
        let good = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(good.starts_with("HTTP/1.1 200 OK\r\n"), "{good}");
        assert!(good.contains("application/openmetrics-text") && good.ends_with("# EOF\n"));
        let head = ask(address, b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(
            head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"),
            "{head}"
        );
        let other = ask(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(other.starts_with("HTTP/1.1 404 "), "{other}");
        let post = ask(
            address,
            b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        )
        .await;
        assert!(
            post.starts_with("HTTP/1.1 405 ") && post.contains("allow: GET, HEAD"),
            "{post}"
        );
        let mut long = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
        long.resize(HEAD_BYTES * 4, b'a');
        let long = ask(address, &long).await;
        assert!(!long.starts_with("HTTP/1.1 200"), "{long}");
        assert!(!ask(address, b"nonsense\r\n\r\n").await.contains("200 OK"));
        // Clients that say nothing take no more than their places.
        let mut idle = Vec::new();
        for _ in 0..MAX_CLIENTS - 1 {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        assert!(
            ask(address, b"GET /metrics HTTP/1.0\r\n\r\n")
                .await
                .contains("200 OK")
        );
        drop(idle);
        server.abort();
    }
}
