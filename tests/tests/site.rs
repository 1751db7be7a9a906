//! The first thing a user does: a site, served by a unikernel.

use std::{
    fs,
    process::{Command, Stdio},
};

use kiln_tests::{EVENT_DEADLINE, Kiln, free_port, get, signal, wait, workspace};

/// Serves the example site and asks for everything the issue of a site names.
fn serves_the_example(engine: &[&str]) {
    let kiln = Kiln::new();
    let image = kiln.build(&workspace().join("examples/site"));
    let port = free_port();
    let publish = format!("{port}:80");
    let mut words = vec!["-p", &publish];
    words.extend(engine);
    words.push(image.to_str().expect("the path is text"));
    kiln.start("site", &words);

    let file = |path: &str| {
        fs::read(workspace().join("examples/site/_site").join(path)).expect("a file of the site")
    };
    for (path, name, kind) in [
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/about/", "about/index.html", "text/html; charset=utf-8"),
        ("/about", "about/index.html", "text/html; charset=utf-8"),
        (
            "/2025/03/virtio-in-five-minutes/",
            "2025/03/virtio-in-five-minutes/index.html",
            "text/html; charset=utf-8",
        ),
        ("/feed.xml", "feed.xml", "text/xml; charset=utf-8"),
        ("/assets/kiln.png", "assets/kiln.png", "image/png"),
        (
            "/assets/logo.svg",
            "assets/logo.svg",
            "image/svg+xml; charset=utf-8",
        ),
        (
            "/assets/style.css",
            "assets/style.css",
            "text/css; charset=utf-8",
        ),
    ] {
        let reply = get(port, path);
        assert_eq!((reply.status, reply.kind.as_str()), (200, kind), "{path}");
        assert!(reply.body == file(name), "{path}: other bytes");
    }
    let missing = get(port, "/no/such/page");
    assert_eq!(missing.status, 404);
    assert!(missing.body == file("404.html"), "not the site's own page");

    assert!(kiln.succeed(["ps"]).contains("site"));
    let log = kiln.succeed(["logs", "site"]);
    assert!(log.contains("\"GET /about HTTP/1.1\" 200"), "{log}");
    assert!(log.contains("\"GET /no/such/page HTTP/1.1\" 404"), "{log}");
    kiln.succeed(["stop", "site"]);
    kiln.succeed(["rm", "site"]);
    assert_eq!(kiln.succeed(["ps", "-q"]), "");
}

#[test]
fn the_example_site_on_process() {
    serves_the_example(&["--engine", "process"]);
}

#[test]
fn the_example_site_on_process_with_packets() {
    serves_the_example(&["--engine", "process", "--net", "direct"]);
}

#[test]
fn the_example_site_on_qemu() {
    serves_the_example(&["--engine", "qemu"]);
}

#[test]
fn a_directory_with_an_index_needs_no_configuration() {
    let kiln = Kiln::new();
    let folder = kiln.folder().join("pages");
    fs::create_dir(&folder).expect("a folder");
    fs::write(folder.join("index.html"), "<h1>plain</h1>").expect("a page");
    let port = free_port();
    kiln.start(
        "pages",
        &[
            "-p",
            &format!("{port}:80"),
            folder.to_str().expect("the path is text"),
        ],
    );
    assert_eq!(get(port, "/").body, b"<h1>plain</h1>");
}

#[test]
fn interrupting_stops_it_gracefully() {
    let kiln = Kiln::new();
    let port = free_port();
    let mut command = kiln.command(["run", "-p", &format!("{port}:80")]);
    let mut process = command
        .arg(workspace().join("examples/site"))
        .spawn()
        .expect("it starts");
    assert_eq!(get(port, "/").status, 200);
    assert!(signal(process.id(), "INT"));
    let status = wait(&mut process, EVENT_DEADLINE);
    let _ = process.kill();
    assert_eq!(status.and_then(|status| status.code()), Some(0));
    assert_eq!(kiln.succeed(["ps", "-q"]), "");
}

#[test]
fn images_are_the_same_bytes_each_time() {
    let kiln = Kiln::new();
    let image = kiln.build(&workspace().join("examples/site"));
    let first = fs::read(&image).expect("an image");
    fs::remove_file(&image).expect("it can go");
    let again = kiln.build(&workspace().join("examples/site"));
    assert!(
        first == fs::read(again).expect("an image"),
        "two builds differ"
    );
}

#[test]
fn qemu_boots_an_image_by_hand() {
    let kiln = Kiln::new();
    let image = kiln.build(&workspace().join("examples/site"));
    let port = free_port();
    // The line of the README, with another port. Nothing of Kiln's is in it but the image.
    let mut process = Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "microvm,acpi=off,pit=off,pic=off,rtc=on",
            "-cpu",
            "max",
            "-m",
            "64M",
            "-no-reboot",
        ])
        .args([
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-serial",
            "stdio",
            "-kernel",
        ])
        .arg(&image)
        .args([
            "-netdev",
            &format!("user,id=n,hostfwd=tcp:127.0.0.1:{port}-:80"),
        ])
        .args(["-device", "virtio-net-device,netdev=n"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64 is needed: tests/tools/install");
    let reply = std::panic::catch_unwind(|| get(port, "/about/"));
    let _ = process.kill();
    let _ = process.wait();
    let reply = reply.expect("an answer");
    let page = fs::read(workspace().join("examples/site/_site/about/index.html")).expect("a page");
    assert!(reply.body == page, "other bytes");
}

#[test]
fn the_engine_is_chosen_and_said() {
    let kiln = Kiln::new();
    let port = free_port();
    let example = workspace().join("examples/site");
    let outcome = kiln.run([
        "run",
        "-d",
        "--name",
        "site",
        "-p",
        &format!("{port}:80"),
        example.to_str().expect("the path is text"),
    ]);
    assert_eq!(outcome.code(), 0, "{outcome}");
    assert!(
        outcome.errors.contains("engine process") || outcome.errors.contains("engine kvm"),
        "{outcome}"
    );
    assert_eq!(get(port, "/").status, 200);
}
