//! What holds whatever happens: scenarios made of a seed, in which pods come, go and change their roles, the source
//! gives, refuses, throttles, panics, hangs and answers nonsense, the clock steps, and news is lost.

use std::{
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use fastrand::Rng;
use tokio::{runtime, task::yield_now};

use super::{super::fixtures::FnSource, *};

const SECOND: Duration = Duration::from_secs(1);
const SCENARIOS: u64 = 150;
const ACTIONS: usize = 20;
const NAMESPACES: usize = 4;
/// How many pods there may be, and as many roles; more than may be asked for at a time, and as many as meet often.
const SIZES: [usize; 4] = [2, 4, 8, 20];
/// As the prefetcher's own.
const LINGER: Duration = Duration::from_secs(60);
const IN_FLIGHT: usize = 16;
const STALENESS: Duration = HOUR;
/// After this, whatever failed before has been tried again: the longest backoff, twice for a call that hung before.
const RECOVERY: Duration = Duration::from_secs(2 * 750 + 120);
/// After this without a word, something unwanted is forgotten: a look, the linger, a look, and a call that hangs.
const FORGOTTEN: Duration = Duration::from_secs(15 + 60 + 15 + 61);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Gives,
    Fails(ErrorClass),
    Slow,
    Hangs,
    Panics,
    Expired,
    EmptyField,
    OtherRole,
}

const MOODS: [Mood; 11] = [
    Mood::Gives,
    Mood::Fails(ErrorClass::Retryable),
    Mood::Fails(ErrorClass::Throttled),
    Mood::Fails(ErrorClass::Denied),
    Mood::Fails(ErrorClass::TooLong),
    Mood::Slow,
    Mood::Hangs,
    Mood::Panics,
    Mood::Expired,
    Mood::EmptyField,
    Mood::OtherRole,
];

/// What was given for an identity last.
struct Fact {
    key: String,
    issued: SystemTime,
    begun: Instant,
    life: Duration,
    /// When it was unwanted first, if that was not over in time.
    unwanted: Option<Instant>,
}

/// What is true, as nobody tells the prefetcher.
struct World {
    rng: Rng,
    /// `None`: another one each call.
    mood: Option<Mood>,
    wanted: WantedRoles,
    unwanted_since: HashMap<RoleIdentity, Instant>,
    silence: Duration,
    given: HashMap<RoleIdentity, Fact>,
    in_flight: BTreeSet<RoleIdentity>,
    calls: Vec<Instant>,
    /// What must not have happened, and did.
    wrong: Vec<String>,
}

struct ScriptedSource {
    clock: Clock,
    world: Arc<Mutex<World>>,
}

struct Scenario {
    rng: Rng,
    told: Arc<ScriptedSource>,
    reader: CredentialReader,
    wanted: watch::Sender<WantedRoles>,
    rate: Rate,
    identities: Vec<RoleIdentity>,
    pods: Vec<Option<RoleIdentity>>,
    _drain: DrainSignal,
}

fn identities(count: usize) -> Vec<RoleIdentity> {
    let one = |n: usize| {
        let duration = SECOND * [900, 1800, 3600, 7200][n % 4];
        RoleIdentity { duration, ..identity(&format!("r{}", n / 2)) }
    };
    (0..count).map(one).collect()
}

// === impl Fact ===

impl Fact {
    fn age(&self, wall: SystemTime) -> Duration {
        self.begun.elapsed().max(wall.duration_since(self.issued).unwrap_or_default())
    }

    fn left(&self, wall: SystemTime) -> Duration {
        self.life.saturating_sub(self.age(wall))
    }

    /// Whether it may have been forgotten.
    fn lingered(&self) -> bool {
        self.unwanted.is_some_and(|since| since.elapsed() >= LINGER)
    }
}

// === impl World ===

impl World {
    fn begin(&mut self, identity: &RoleIdentity, wall: SystemTime) -> (Mood, Duration, Duration) {
        let mut wrong = Vec::new();
        if !self.in_flight.insert(identity.clone()) {
            wrong.push("asked for twice at a time");
        }
        if self.in_flight.len() > IN_FLIGHT {
            wrong.push("too many at a time");
        }
        if !self.wanted.contains_key(identity) {
            wrong.push("asked for and not authorised");
        }
        if self.silence > STALENESS {
            wrong.push("asked for on stale authority");
        }
        if let Some(fact) = self.given.get(identity)
            && fact.age(wall) < schedule::refresh_after(fact.life, 0.0)
            && !fact.lingered()
        {
            wrong.push("asked for while what is held is fresh");
        }
        self.wrong.extend(wrong.iter().map(|what| format!("{what}: {identity}")));
        self.calls.push(Instant::now());
        let mood = self.mood.unwrap_or_else(|| MOODS[self.rng.usize(..MOODS.len())]);
        let most = if mood == Mood::Slow { 20_000 } else { 300 };
        let latency = Duration::from_millis(self.rng.u64(5..most));
        (mood, latency, identity.duration * self.rng.u32(3..=4) / 4)
    }

    fn end(&mut self, identity: &RoleIdentity, fact: Option<Fact>, wall: SystemTime) {
        self.in_flight.remove(identity);
        if let Some(mut fact) = fact.filter(|fact| !fact.left(wall).is_zero()) {
            fact.unwanted = self.unwanted_since.get(identity).copied();
            self.given.insert(identity.clone(), fact);
        }
    }
}

// === impl ScriptedSource ===

impl ScriptedSource {
    async fn call(&self, identity: &RoleIdentity) -> Result<Credentials, SourceError> {
        let (issued, begun) = (self.clock.now(), Instant::now());
        let (mood, latency, life) = self.world.lock().unwrap().begin(identity, issued);
        sleep(latency).await;
        if mood == Mood::Hangs {
            // Given up after a minute: what comes then is told to nobody.
            let world = self.world.clone();
            let hung = identity.clone();
            let _over = scopeguard(move || {
                if let Ok(mut world) = world.lock() {
                    world.in_flight.remove(&hung);
                }
            });
            pending::<()>().await;
        }
        let key = format!("{identity} for {:?} at {begun:?}", identity.duration);
        let mut answer = Credentials::test(&identity.role, &key, issued, life);
        match mood {
            Mood::Expired => answer.expires = issued - SECOND,
            Mood::EmptyField => answer.session_token = Secret::new(""),
            Mood::OtherRole => answer.role = "arn:aws:iam::123456789012:role/z".parse().unwrap(),
            _ => {}
        }
        let good = matches!(mood, Mood::Gives | Mood::Slow);
        let fact = good.then_some(Fact { key, issued, begun, life, unwanted: None });
        self.world.lock().unwrap().end(identity, fact, self.clock.now());
        match mood {
            Mood::Fails(class) => Err(SourceError { class, message: "refused".to_owned() }),
            // Without the message that panic! prints.
            Mood::Panics => resume_unwind(Box::new("panicked")),
            _ => Ok(answer),
        }
    }
}

impl CredentialSource for ScriptedSource {
    fn issue<'a>(
        &'a self,
        identity: &'a RoleIdentity,
        _claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Credentials, SourceError>> {
        Box::pin(self.call(identity))
    }
}

/// Runs something when it goes out of scope.
fn scopeguard(run: impl FnMut()) -> impl Drop {
    struct Guard<F: FnMut()>(F);
    impl<F: FnMut()> Drop for Guard<F> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    Guard(run)
}

// === impl Scenario ===

impl Scenario {
    fn start(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        // The prefetcher's own draws.
        fastrand::seed(seed);
        let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let (wanted, receiver) = watch::channel(WantedRoles::default());
        let world = Arc::new(Mutex::new(World {
            rng: rng.fork(),
            mood: Some(Mood::Gives),
            wanted: WantedRoles::default(),
            unwanted_since: HashMap::new(),
            silence: Duration::ZERO,
            given: HashMap::new(),
            in_flight: BTreeSet::new(),
            calls: Vec::new(),
            wrong: Vec::new(),
        }));
        let told = Arc::new(ScriptedSource { clock: clock.clone(), world: world.clone() });
        let rate = Rate { burst: rng.u32(1..20), period: Duration::from_millis(rng.u64(50..1000)) };
        let (prefetcher, reader) = Prefetcher::new(
            Config { sts_rate: rate, max_staleness: Some(STALENESS) },
            PrefetcherParts {
                source: told.clone(),
                silence: Box::new(move || Some(world.lock().unwrap().silence)),
                ..PrefetcherParts::test(FnSource(|_: &_| pending()), clock, receiver)
            },
        );
        let (signal, drain) = lifecycle::drain();
        tokio::spawn(prefetcher.run(drain));
        let size = SIZES[rng.usize(..SIZES.len())];
        let (identities, pods) = (identities(size), vec![None; size]);
        Self { rng, told, reader, wanted, rate, identities, pods, _drain: signal }
    }

    async fn run(mut self) {
        for _ in 0..ACTIONS {
            self.act().await;
            let most = [1_000, 60_000, 600_000][self.rng.usize(..3)];
            sleep(Duration::from_millis(self.rng.u64(1..most))).await;
            self.check().await;
        }
        // From now on everything is well, and nobody says so.
        {
            let mut world = self.told.world.lock().unwrap();
            world.mood = Some(Mood::Gives);
            world.silence = Duration::ZERO;
        }
        sleep(RECOVERY).await;
        self.check().await;
        for identity in self.told.world.lock().unwrap().wanted.keys() {
            let state = self.reader.get(identity);
            assert!(matches!(state, Some(State::Ready(_))), "lost: {identity}");
        }
        self.check_rate();
    }

    /// One thing happens.
    async fn act(&mut self) {
        match self.rng.u32(..12) {
            0..5 => self.publish().await,
            5..8 => {
                let mood = self.rng.bool().then(|| MOODS[self.rng.usize(..MOODS.len())]);
                self.told.world.lock().unwrap().mood = mood;
            }
            8 => self.told.world.lock().unwrap().mood = Some(Mood::Gives),
            9 => self.told.clock.step(self.rng.i64(-5400..5400)),
            10 => {
                let silence = if self.rng.bool() { Duration::ZERO } else { STALENESS * 2 };
                self.told.world.lock().unwrap().silence = silence;
            }
            _ => {
                let asked = &self.identities[self.rng.usize(..self.identities.len())];
                let _ = self.reader.wait(asked, Duration::from_millis(400)).await;
                self.check().await;
            }
        }
    }

    /// Some pods come, go, or change their role; half of the times the prefetcher is not told.
    async fn publish(&mut self) {
        let all = self.identities.clone();
        for _ in 0..self.rng.usize(1..=self.pods.len()) {
            let wants = self.rng.bool().then(|| all[self.rng.usize(..all.len())].clone());
            let pod = self.rng.usize(..self.pods.len());
            self.pods[pod] = wants;
        }
        let mut wanted = std::collections::BTreeMap::<_, BTreeSet<_>>::new();
        for (n, identity) in self.pods.iter().enumerate() {
            let Some(identity) = identity.clone() else { continue };
            let namespace = format!("n{}", n % NAMESPACES);
            let claimant = Claimant::new(&namespace, &format!("p{n}"));
            wanted.entry(identity).or_default().insert(claimant);
        }
        let wanted: WantedRoles = Arc::new(wanted);
        let told = self.rng.bool();
        {
            let mut world = self.told.world.lock().unwrap();
            world.unwanted_since.retain(|identity, _| !wanted.contains_key(identity));
            let now = Instant::now();
            for identity in all.iter().filter(|identity| !wanted.contains_key(identity)) {
                world.unwanted_since.entry(identity.clone()).or_insert(now);
                if let Some(fact) = world.given.get_mut(identity) {
                    fact.unwanted.get_or_insert(now);
                }
            }
            world.wanted = wanted.clone();
        }
        self.wanted.send_if_modified(|held| {
            *held = wanted;
            told
        });
        if told {
            self.settle().await;
            let mut world = self.told.world.lock().unwrap();
            let World { wanted, given, .. } = &mut *world;
            for (identity, fact) in given.iter_mut() {
                if wanted.contains_key(identity) && !fact.lingered() {
                    fact.unwanted = None;
                }
            }
        }
    }

    /// Lets everybody finish what is to happen at this instant.
    async fn settle(&self) {
        for _ in 0..20 {
            yield_now().await;
        }
    }

    async fn check(&self) {
        self.settle().await;
        let wall = self.told.clock.now();
        let world = self.told.world.lock().unwrap();
        assert!(world.wrong.is_empty(), "{:#?}", world.wrong);
        for identity in &self.identities {
            let fact = world.given.get(identity);
            let good = fact.filter(|fact| !fact.left(wall).is_zero());
            let state = self.reader.get(identity);
            if let Some(State::Ready(held)) = &state {
                let key = good.map(|fact| fact.key.as_str());
                let held = Some(held.credentials.access_key_id.as_str());
                assert_eq!(held, key, "served and not good: {identity}");
            } else if good.is_some_and(|fact| !fact.lingered()) {
                panic!("good and not served: {identity}");
            }
            let since = world.unwanted_since.get(identity);
            let over = since.is_some_and(|since| since.elapsed() > FORGOTTEN);
            assert!(!over || state.is_none(), "not forgotten: {identity}");
        }
    }

    /// Each call is one of the burst or came with a period of its own: within no time are there more.
    fn check_rate(&self) {
        let Rate { burst, period } = self.rate;
        let mut used = Duration::ZERO;
        let mut last = None;
        for call in &self.told.world.lock().unwrap().calls {
            let since = last.map_or(Duration::ZERO, |last| call.duration_since(last));
            used = used.saturating_sub(since) + period;
            assert!(used <= period * burst, "more calls than {:?}", self.rate);
            last = Some(*call);
        }
    }
}

#[test]
fn whatever_happens_nothing_is_lost_doubled_stale_or_unauthorised() {
    for seed in 0..SCENARIOS {
        let scenario = || {
            let mut paused = runtime::Builder::new_current_thread();
            let runtime = paused.enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async { Scenario::start(seed).run().await });
        };
        if let Err(problem) = catch_unwind(AssertUnwindSafe(scenario)) {
            eprintln!("with seed {seed}");
            resume_unwind(problem);
        }
    }
}
