import { useState } from 'react'

import { Coast } from './Coast.tsx'
import { hours } from './hours.ts'
import './App.css'

export function App() {
  const [hour, setHour] = useState(hours[2])
  const [boats, setBoats] = useState(1)

  return (
    <main style={{ '--ink': hour.ink } as React.CSSProperties}>
      <Coast hour={hour} boats={boats} />

      <section className="card">
        <h1>Somebody left the light on</h1>
        <p>
          Change this sentence and save. The picture stays, the boats stay, and only the words move.
        </p>

        <div className="row" role="group" aria-label="Time of day">
          {hours.map((each) => (
            <button key={each.name} aria-pressed={each === hour} onClick={() => setHour(each)}>
              {each.name}
            </button>
          ))}
        </div>

        <div className="row">
          <button onClick={() => setBoats(Math.min(boats + 1, 7))}>Send a boat out</button>
          <button onClick={() => setBoats(Math.max(boats - 1, 0))}>Call one home</button>
          <span className="count">
            {boats === 0 ? 'Everyone is home.' : `${boats} ${boats === 1 ? 'boat' : 'boats'} out`}
          </span>
        </div>
      </section>
    </main>
  )
}
