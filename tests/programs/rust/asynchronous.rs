//! tokio with its multi-threaded scheduler: many connections, timers, signals, blocking work. Prints only what must be the same on
//! Linux and in a unikernel, and ends with "ok".

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::mpsc,
};

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(run());
    drop(runtime);
    println!("ok");
}

async fn run() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                    stream.write_all(&buffer[..length]).await.unwrap();
                }
            });
        }
    });
    let (sender, mut receiver) = mpsc::unbounded_channel();
    for number in 0..100_u64 {
        let sender = sender.clone();
        tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let mut right = 0;
            for round in 0..20_u64 {
                let text = (number * round).to_le_bytes();
                let mut answer = [0; 8];
                stream.write_all(&text).await.unwrap();
                stream.read_exact(&mut answer).await.unwrap();
                right += u64::from(answer == text);
            }
            sender.send(right).unwrap();
        });
    }
    drop(sender);
    let mut total = 0;
    while let Some(right) = receiver.recv().await {
        total += right;
    }
    println!("{total}");

    let start = Instant::now();
    let sleeps: Vec<_> = (0..50)
        .map(|number| tokio::spawn(tokio::time::sleep(Duration::from_millis(5 + number % 10))))
        .collect();
    for sleep in sleeps {
        sleep.await.unwrap();
    }
    println!("{}", start.elapsed() >= Duration::from_millis(14));
    let late = tokio::time::timeout(Duration::from_millis(10), std::future::pending::<()>()).await;
    println!("{}", late.is_err());

    let blocking: Vec<_> = (0..20_u64)
        .map(|number| tokio::task::spawn_blocking(move || number * 2))
        .collect();
    let mut sum = 0;
    for task in blocking {
        sum += task.await.unwrap();
    }
    println!("{sum}");

    let one = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let two = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    one.send_to(b"datagram", two.local_addr().unwrap())
        .await
        .unwrap();
    let mut buffer = [0; 32];
    println!("{}", two.recv(&mut buffer).await.unwrap());
}
