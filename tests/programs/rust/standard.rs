//! Rust's standard library: threads, channels, files, sockets, time, panics. Prints only what must be the same on
//! Linux and in a unikernel, and ends with "ok".

use std::{
    collections::HashMap,
    fs,
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    panic,
    path::PathBuf,
    sync::{Arc, Barrier, Condvar, Mutex, RwLock, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

fn main() {
    threads();
    files();
    sockets();
    time();
    panics();
    collections();
    println!("ok");
}

fn threads() {
    println!("-- threads");
    let counter = Arc::new(Mutex::new(0_u64));
    let barrier = Arc::new(Barrier::new(8));
    let handles: Vec<_> = (0..8_u64)
        .map(|number| {
            let (counter, barrier) = (Arc::clone(&counter), Arc::clone(&barrier));
            thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || {
                    barrier.wait();
                    for _ in 0..1000 {
                        *counter.lock().unwrap() += number;
                    }
                    thread::current().name().unwrap().len()
                })
                .unwrap()
        })
        .collect();
    let lengths: usize = handles
        .into_iter()
        .map(|handle| handle.join().unwrap())
        .sum();
    println!("{lengths} {}", counter.lock().unwrap());

    let (sender, receiver) = mpsc::sync_channel(4);
    thread::scope(|scope| {
        for number in 0..4 {
            let sender = sender.clone();
            scope.spawn(move || {
                (0..250).for_each(|item| sender.send(number * 1000 + item).unwrap())
            });
        }
        drop(sender);
        println!("{}", receiver.iter().map(|item: u64| item).sum::<u64>());
    });

    let pair = Arc::new((Mutex::new(false), Condvar::new()));
    let other = Arc::clone(&pair);
    let handle = thread::spawn(move || {
        *other.0.lock().unwrap() = true;
        other.1.notify_one();
    });
    let mut ready = pair.0.lock().unwrap();
    while !*ready {
        ready = pair.1.wait(ready).unwrap();
    }
    drop(ready);
    handle.join().unwrap();
    let (guard, timeout) = pair
        .1
        .wait_timeout_while(pair.0.lock().unwrap(), Duration::from_millis(10), |_| true)
        .unwrap();
    println!("{} {}", *guard, timeout.timed_out());
    println!("{}", thread::available_parallelism().is_ok());
    let lock = RwLock::new(1);
    println!("{}", *lock.read().unwrap() + *lock.read().unwrap());
    thread::park_timeout(Duration::from_millis(1));
}

fn files() {
    println!("-- files");
    let parent = std::env::var_os("CHECK_DIRECTORY").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = parent.join(format!("kiln-standard-{}", std::process::id()));
    fs::create_dir_all(folder.join("a/b/c")).unwrap();
    let path = folder.join("a/file.txt");
    fs::write(&path, "one\ntwo\nthree\n").unwrap();
    let lines: Vec<String> = BufReader::new(fs::File::open(&path).unwrap())
        .lines()
        .map(Result::unwrap)
        .collect();
    println!("{lines:?}");
    let mut file = fs::OpenOptions::new()
        .read(true)
        .append(true)
        .open(&path)
        .unwrap();
    file.write_all(b"four\n").unwrap();
    file.seek(SeekFrom::Start(4)).unwrap();
    let mut rest = String::new();
    file.read_to_string(&mut rest).unwrap();
    println!("{rest:?}");
    file.set_len(3).unwrap();
    file.sync_all().unwrap();
    println!("{:?}", fs::read_to_string(&path).unwrap());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    println!(
        "{} {:o} {}",
        metadata.len(),
        metadata.permissions().mode(),
        metadata.is_file()
    );
    println!("{}", fs::copy(&path, folder.join("copy")).unwrap());
    fs::rename(folder.join("copy"), folder.join("moved")).unwrap();
    std::os::unix::fs::symlink("moved", folder.join("link")).unwrap();
    println!("{:?}", fs::read_link(folder.join("link")).unwrap());
    println!(
        "{}",
        fs::canonicalize(folder.join("link"))
            .unwrap()
            .ends_with("moved")
    );
    let mut names: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    println!("{names:?}");
    println!(
        "{:?}",
        fs::remove_dir(folder.join("a")).map_err(|error| error.kind())
    );
    println!(
        "{:?}",
        fs::read(folder.join("none")).map_err(|error| error.kind())
    );
    fs::remove_dir_all(&folder).unwrap();
    println!("{}", folder.exists());
}

fn sockets() {
    println!("-- sockets");
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address).unwrap();
        let server = listener.local_addr().unwrap();
        let handle = thread::spawn(move || {
            for stream in listener.incoming().take(3) {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(stream.try_clone().unwrap())
                    .read_line(&mut line)
                    .unwrap();
                stream.write_all(line.to_uppercase().as_bytes()).unwrap();
            }
        });
        for number in 0..3 {
            let mut stream = TcpStream::connect(server).unwrap();
            stream.set_nodelay(true).unwrap();
            writeln!(stream, "hello {number}").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            println!("{answer:?} {}", stream.peer_addr().unwrap().ip());
        }
        handle.join().unwrap();
        println!(
            "{:?}",
            TcpStream::connect(server)
                .map_err(|error| error.kind())
                .map(drop)
        );
    }
    let one = UdpSocket::bind("127.0.0.1:0").unwrap();
    let two = UdpSocket::bind("127.0.0.1:0").unwrap();
    one.send_to(b"datagram", two.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 32];
    let (length, from) = two.recv_from(&mut buffer).unwrap();
    println!("{length} {}", from == one.local_addr().unwrap());
    two.set_read_timeout(Some(Duration::from_millis(10)))
        .unwrap();
    println!("{:?}", two.recv(&mut buffer).map_err(|error| error.kind()));
    let (mut left, mut right) = UnixStream::pair().unwrap();
    left.write_all(b"pair").unwrap();
    drop(left);
    let mut text = String::new();
    right.read_to_string(&mut text).unwrap();
    println!("{text}");
}

fn time() {
    println!("-- time");
    let start = Instant::now();
    thread::sleep(Duration::from_millis(20));
    println!("{}", start.elapsed() >= Duration::from_millis(20));
    println!(
        "{}",
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs()
            > 1_600_000_000
    );
}

fn panics() {
    println!("-- panics");
    panic::set_hook(Box::new(|_| {}));
    let caught = panic::catch_unwind(|| {
        let empty: Vec<u32> = Vec::new();
        empty[std::hint::black_box(3)]
    });
    println!("{}", caught.is_err());
    println!(
        "{}",
        thread::spawn(|| panic!("in a thread")).join().is_err()
    );
}

fn collections() {
    println!("-- collections");
    let map: HashMap<u64, u64> = (0..100_000).map(|key| (key, key * key)).collect();
    println!(
        "{} {}",
        map.len(),
        map.values().copied().fold(0, u64::wrapping_add)
    );
    let mut numbers: Vec<u32> = (0..1_000_000_u32)
        .map(|number| number.wrapping_mul(2_654_435_761))
        .collect();
    numbers.sort_unstable();
    println!("{} {}", numbers[0], numbers[999_999]);
}
