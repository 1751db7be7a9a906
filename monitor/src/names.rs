//! Names for instances that were given none: two short words, easy to say and to type.

const FIRST: [&str; 48] = [
    "amber", "apt", "ashen", "azure", "baked", "bold", "brave", "brisk", "bright", "calm", "clear",
    "coral", "crisp", "dry", "eager", "early", "fair", "fast", "fine", "fired", "firm", "fond",
    "free", "fresh", "glad", "glazed", "golden", "good", "grand", "happy", "jolly", "keen", "kind",
    "light", "lucky", "mild", "neat", "nimble", "noble", "plain", "proud", "quick", "quiet",
    "rosy", "sunny", "swift", "warm", "wise",
];

const SECOND: [&str; 48] = [
    "amphora", "basin", "beaker", "bowl", "brick", "carafe", "chalice", "clay", "crock", "cruet",
    "cup", "dish", "ember", "ewer", "finial", "flask", "flute", "glaze", "goblet", "hearth", "jar",
    "jug", "kettle", "lantern", "mosaic", "mug", "ochre", "oven", "pitcher", "plate", "platter",
    "pot", "quartz", "saucer", "shard", "shell", "slate", "spout", "stein", "tankard", "teapot",
    "tile", "trivet", "tureen", "urn", "vase", "vessel", "wheel",
];

/// A name that `taken` does not know.
pub fn choose(taken: impl Fn(&str) -> bool) -> String {
    let mut seed = seed();
    let mut name = String::new();
    for attempt in 0..64u32 {
        let first = FIRST[usize::try_from(seed % 48).unwrap_or(0)];
        let second = SECOND[usize::try_from(seed / 48 % 48).unwrap_or(0)];
        name = format!("{first}-{second}");
        if attempt >= 8 {
            // Most pairs are in use: a number makes room.
            name = format!("{name}-{}", seed / 2304 % 10_000);
        }
        if !taken(&name) {
            break;
        }
        seed = mix(seed);
    }
    name
}

/// Different for each process and moment; nothing secret depends on it.
fn seed() -> u64 {
    let time = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |time| {
            u64::from(time.subsec_nanos()) ^ (time.as_secs() << 20)
        });
    mix(time ^ (u64::from(std::process::id()) << 32))
}

/// The finaliser of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_fresh_even_when_most_are_taken() {
        let mut taken = HashSet::new();
        for _ in 0..5000 {
            let name = choose(|name| taken.contains(name));
            assert!(crate::arguments::parse_name(&name).is_ok());
            assert!(taken.insert(name));
        }
    }
}
