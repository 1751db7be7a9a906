//! The least memory with which programs still answer.

use std::{path::PathBuf, process::Command};

use kiln_tests::{Kiln, engines, free_port};

use crate::{
    server::{self, FRONT_PAGE, Server},
    throughput::{self, SMALL_FILE},
};

/// What is tried, in MiB.
const SIZES: [u32; 12] = [2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 64];

/// A program to start and to ask.
struct Subject {
    name: &'static str,
    image: PathBuf,
    port: u16,
    request: &'static [u8],
    arguments: &'static [&'static str],
}

/// Finds the least memory for site, nginx and redis on each engine.
pub fn measure() {
    let kiln = Kiln::new();
    let subjects = [
        Subject {
            name: "site",
            image: server::site_image(&kiln),
            port: 80,
            request: FRONT_PAGE,
            arguments: &[],
        },
        Subject {
            name: "nginx",
            image: kiln.build(&throughput::nginx_folder(&kiln)),
            port: 80,
            request: SMALL_FILE,
            arguments: &[],
        },
        Subject {
            name: "redis",
            image: throughput::redis_image(&kiln),
            port: 6379,
            request: b"PING\r\n",
            arguments: &[
                "--",
                "--save",
                "",
                "--appendonly",
                "no",
                "--protected-mode",
                "no",
            ],
        },
    ];
    for engine in engines() {
        for subject in &subjects {
            let least = SIZES
                .into_iter()
                .find(|size| answers(&kiln, &engine, subject, *size));
            match least {
                Some(size) => println!(
                    "{engine}: {} answers with {size} MiB (allowed: 16)",
                    subject.name
                ),
                None => println!(
                    "{engine}: {} does not answer even with {} MiB",
                    subject.name,
                    SIZES[SIZES.len() - 1]
                ),
            }
        }
    }
}

fn answers(kiln: &Kiln, engine: &str, subject: &Subject, size: u32) -> bool {
    let port = free_port();
    let memory = format!("{size}M");
    let mut command: Command = server::unikernel(
        kiln,
        engine,
        &["-m", &memory],
        port,
        subject.port,
        &subject.image,
    );
    command.args(subject.arguments);
    let mut server = Server::start(&mut command, port);
    // Three answers: the first may still fit into memory that the second lacks.
    (0..3).all(|_| server.first_byte(subject.request).is_some())
}
