//! CPU time of an idle unikernel: of all processes that make it up.

use std::{collections::HashMap, fs, thread, time::Duration};

use kiln_tests::{Kiln, engines, free_port};

use crate::server::{self, FRONT_PAGE, Server};

/// Clock ticks a second in /proc/PID/stat: `USER_HZ`, 100 on every Linux for x86-64.
const TICKS: f64 = 100.0;
/// Until what starts has started.
const SETTLING: Duration = Duration::from_secs(2);

/// Lets the example site idle on each engine.
pub fn measure(seconds: u32) {
    let kiln = Kiln::new();
    let image = server::site_image(&kiln);
    for engine in engines() {
        let port = free_port();
        let mut command = server::unikernel(&kiln, &engine, &[], port, 80, &image);
        let mut server = Server::start(&mut command, port);
        if server.first_byte(FRONT_PAGE).is_none() {
            println!("{engine}: does not answer");
            continue;
        }
        thread::sleep(SETTLING);
        let before = ticks(&server, &kiln);
        thread::sleep(Duration::from_secs(seconds.into()));
        let after = ticks(&server, &kiln);
        let used: u64 = after
            .iter()
            .map(|(id, ticks)| ticks.saturating_sub(before.get(id).copied().unwrap_or(0)))
            .sum();
        println!(
            "{engine}: {} processes used {:.3} s of CPU in {seconds} s: {:.3} % of one core (allowed: 0.2 %)",
            after.len(),
            used as f64 / TICKS,
            used as f64 / TICKS / f64::from(seconds) * 100.0
        );
    }
}

/// CPU time so far of the command and of all that belongs to it: its descendants, and whoever has its state
/// in the environment (a monitor may have left the family).
fn ticks(server: &Server, kiln: &Kiln) -> HashMap<u32, u64> {
    let state = kiln.folder().display().to_string();
    let mut parents = HashMap::new();
    let mut times = HashMap::new();
    let mut members = vec![server.id()];
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // After the name, which may contain anything: state, parent, ..., utime (14th field) and stime.
        let Some((_, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |index: usize| {
            fields
                .get(index)
                .and_then(|field| field.parse::<u64>().ok())
                .unwrap_or(0)
        };
        parents.insert(id, number(1) as u32);
        times.insert(id, number(11) + number(12));
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if id != std::process::id() && String::from_utf8_lossy(&environment).contains(&state) {
            members.push(id);
        }
    }
    loop {
        let more: Vec<u32> = parents
            .iter()
            .filter(|(id, parent)| members.contains(parent) && !members.contains(id))
            .map(|(id, _)| *id)
            .collect();
        if more.is_empty() {
            break;
        }
        members.extend(more);
    }
    members.sort_unstable();
    members.dedup();
    members
        .into_iter()
        .filter_map(|id| Some((id, *times.get(&id)?)))
        .collect()
}
