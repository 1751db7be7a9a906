//! Every target, for a short while.

use std::{
    fs,
    panic::catch_unwind,
    path::Path,
    time::{Duration, Instant},
};

use kiln_fuzz::{
    TARGETS, Target,
    mutate::{Random, mutate},
};

/// Longest time for one input.
const LIMIT: Duration = Duration::from_secs(5);

fn seconds() -> u64 {
    std::env::var("KILN_FUZZ_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1)
}

/// Feeds one input; one that fails is kept where the message says.
fn feed(target: &Target, bytes: &[u8]) {
    let start = Instant::now();
    let outcome = catch_unwind(|| (target.run)(bytes));
    let slow = start.elapsed() > LIMIT;
    if outcome.is_ok() && !slow {
        return;
    }
    let path =
        std::env::temp_dir().join(format!("kiln-fuzz-{}-{}", target.name, std::process::id()));
    let _ = fs::write(&path, bytes);
    let what = if slow { "took too long" } else { "failed" };
    panic!(
        "{} {what}; the input is in {}: when it is mended, move it to fuzz/regressions/{}/",
        target.name,
        path.display(),
        target.name
    );
}

fn run(name: &str) {
    let target = TARGETS
        .iter()
        .find(|target| target.name == name)
        .expect("a target");
    let regressions = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("regressions")
        .join(name);
    for entry in fs::read_dir(regressions).into_iter().flatten().flatten() {
        feed(
            target,
            &fs::read(entry.path()).expect("a regression can be read"),
        );
    }
    let seeds = (target.seeds)();
    for seed in &seeds {
        feed(target, seed);
        for cut in (0..seed.len()).step_by(seed.len() / 200 + 1) {
            feed(target, &seed[..cut]);
        }
    }
    // Another row of inputs each day would find more, and fail where nobody changed anything: the row is fixed.
    let mut random = Random::new(1);
    let end = Instant::now() + Duration::from_secs(seconds());
    let mut count = 0u64;
    while Instant::now() < end {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        let other = &seeds[random.below(seeds.len())];
        mutate(&mut bytes, other, &mut random);
        feed(target, &bytes);
        count += 1;
    }
    println!("{name}: {count} inputs");
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name));
            }
        )*

        #[test]
        fn all_targets_are_run() {
            let names = [$(stringify!($name)),*];
            assert!(TARGETS.iter().map(|target| target.name).eq(names));
        }
    };
}

targets! { elf image root project loader_cache manifest link dns dhcp frames summon name_server front }
